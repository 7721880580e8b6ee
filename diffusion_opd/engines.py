"""What Trainer and accelerate's engines are told so that they suit a denoiser: arguments, FSDP2's settings, and
torch.compile."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, DynamoBackend, FullyShardedDataParallelPlugin, TorchDynamoPlugin
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.integrations import is_deepspeed_zero3_enabled

from .config import DiffusionConfig
from .denoisers import Denoisers, parts_of
from .policy import tuner_layers
from .quantization import is_quantised_weight

logger = get_logger(__name__)

GRAPHS_PER_PARTY = 8  # with and without gradient, and for a few shapes


def checkpoint_block(block: Any, *args: Any) -> Any:
    """A block whose activations are computed again in the backward pass, with its LoRAs as strong as they were:
    diffusers scales them (`scale` of `joint_attention_kwargs`) for the duration of the denoiser's forward alone."""
    layers: list[Any] = tuner_layers(block) if isinstance(block, nn.Module) else []
    strengths = [dict(layer.scaling) for layer in layers]

    def run(*args: Any) -> Any:
        before = [layer.scaling for layer in layers]
        for layer, strength in zip(layers, strengths, strict=True):
            layer.scaling = strength
        try:
            return block(*args)
        finally:
            for layer, strength in zip(layers, before, strict=True):
                layer.scaling = strength

    return checkpoint(run, *args, use_reentrant=False)


def settle_arguments(args: DiffusionConfig, denoiser: ModelMixin) -> None:
    """Sets what Trainer would take a denoiser's arguments to mean for a language model.

    Raises:
        ValueError: if activations are to be checkpointed in another way than diffusers does, or several denoisers are
            trained in a way that loses the gradient of one: under ZeRO-3, or with `ddp_find_unused_parameters`.
    """
    if args.activation_checkpointing:
        if args.activation_checkpointing_kwargs not in (None, {"use_reentrant": False}):
            raise ValueError(
                f"`activation_checkpointing_kwargs={args.activation_checkpointing_kwargs}` is not supported: "
                "diffusers checkpoints every block, without re-entrance."
            )
        # Trainer would call methods that no diffusers model has. Enabled the diffusers way, then hidden from
        # Trainer: `activation_checkpointing` is transformers' other name of the same flag
        denoiser.enable_gradient_checkpointing(checkpoint_block)
        args.gradient_checkpointing = args.activation_checkpointing = False
    if isinstance(denoiser, Denoisers) and is_deepspeed_zero3_enabled():
        # Its first backward pass of a step overwrites the gradients of the step before; to those of a denoiser that has
        # no part in that pass the next ones would be added
        raise ValueError(
            f"ZeRO-3 does not train several denoisers ({', '.join(parts_of(denoiser))}), whose steps come one after "
            "the other; use FSDP2, DDP or ZeRO-2."
        )
    if isinstance(denoiser, Denoisers) and args.ddp_find_unused_parameters:
        raise ValueError(
            "`ddp_find_unused_parameters=True` would leave the gradient of a denoiser that the last learnt step does "
            "not call as it is in each process; leave it out."
        )
    if quantised := [name for name, weight in denoiser.named_parameters() if is_quantised_weight(weight)]:
        # Loaded alike by every process; torchao's cannot be broadcast
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(denoiser, quantised)
    if args.ddp_find_unused_parameters is None:  # Trainer: True for anything but a PreTrainedModel
        args.ddp_find_unused_parameters = False
    if args.ddp_broadcast_buffers is None:  # constant in a denoiser; a broadcast would precede every forward
        args.ddp_broadcast_buffers = False
    if args.n_gpu > 1:
        logger.warning("One process sees several GPUs and uses the first; start with `accelerate launch` to use all.")
        args._n_gpu = 1


def check_quantised(denoiser: nn.Module, is_fsdp: bool, is_deepspeed: bool) -> None:
    """Refuses quantised weights that an engine cannot hold: FSDP2 shards none in eight bits (it leaves those of four
    whole), and none of torchao's, which DeepSpeed cannot move either.

    Raises:
        ValueError: naming their kind.
    """
    for weight in filter(is_quantised_weight, denoiser.parameters()):
        of_torchao = type(weight.data) is not Tensor
        if (is_fsdp and (of_torchao or weight.dtype == torch.int8)) or (is_deepspeed and of_torchao):
            raise ValueError(
                f"{'FSDP2' if is_fsdp else 'DeepSpeed'} cannot hold quantised weights of the kind "
                f"{type(weight).__name__}; use DDP, or quantise by 'bitsandbytes_4bit'."
            )


def settle_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    """Sets what a denoiser needs of FSDP.

    Raises:
        ValueError: if the plugin is of version 1, or checkpoints activations itself.
    """
    if plugin.fsdp_version == 1:
        raise ValueError(
            "FSDP version 1 flattens frozen and trained parameters into one; set `fsdp_version: 2` (as "
            "`diffusion_opd/accelerate_configs/fsdp2.yaml` does)."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "`fsdp_activation_checkpointing` renames the modules that are saved; leave it out, and set "
            "`activation_checkpointing` of the training arguments."
        )
    plugin.cpu_ram_efficient_loading = False  # every process has loaded, and asked, the whole model
    if plugin.mixed_precision_policy is not None:
        # accelerate's own would round the timesteps, and add up the gradients of all learnt steps in bfloat16;
        # its autocast casts what is to be cast
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy,
            reduce_dtype=torch.float32,
            output_dtype=None,
            cast_forward_inputs=False,
        )


def take_compilation(plugin: TorchDynamoPlugin, args: DiffusionConfig) -> dict[str, Any] | None:
    """Takes torch.compile out of accelerate's hands, whose compiled wrapper would leave those eager who ask the
    denoiser itself: the arguments for [`compile_blocks`], or `None` if nothing is to be compiled.

    Raises:
        ValueError: under ZeRO-3, whose graphs would break at each layer; and for modes with CUDA graphs.
    """
    asked, backend = None, plugin.backend
    if args.torch_compile:
        asked = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
    elif backend != DynamoBackend.NO:
        asked = plugin.to_kwargs()
    plugin.backend = DynamoBackend.NO
    if asked is not None and is_deepspeed_zero3_enabled():
        raise ValueError(
            "`torch_compile` does not work with ZeRO-3, whose hooks gather the weights of each layer within a block; "
            "leave it out, or use FSDP2."
        )
    if asked is not None and asked.get("mode") in ("reduce-overhead", "max-autotune"):
        # A graph writes each answer where the last one was: a teacher's over the student's, whose gradient is to come
        raise ValueError(
            f"`torch_compile_mode={asked['mode']!r}` records CUDA graphs, which overwrite what the student predicted "
            "as its teacher is asked; leave it out, or use 'max-autotune-no-cudagraphs'."
        )
    return asked


@contextlib.contextmanager
def held_gradient_sync(accelerator: Accelerator, model: nn.Module, num_backwards: int) -> Iterator[Any]:
    """Of the `num_backwards` backward passes of a micro-batch, the LAST one of an optimizer step alone synchronises
    gradients: call what this yields when only that one is left.

    DDP decides at the forward pass, so the release must come before the forward passes of that step; accelerate's
    DeepSpeed wrapper calls `engine.step()` in every backward pass while `sync_gradients` is set. Until then FSDP
    holds whole gradients; accelerate's `sync_each_batch` is the way to ask for a reduction in each backward pass.
    """
    state = accelerator.gradient_state
    stack = contextlib.ExitStack()
    holds = accelerator.distributed_type == DistributedType.DEEPSPEED or not state.plugin_kwargs.get(
        "sync_each_batch", False
    )
    if holds and state.sync_gradients and num_backwards > 1:
        state._set_sync_gradients(False)
        stack.callback(state._set_sync_gradients, True)
        stack.enter_context(accelerator.no_sync(model))
    with stack:
        yield stack.close


class _Touched(torch.autograd.Function):
    """A loss, unchanged, whose backward pass reaches further parameters with zeros."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.shapes = [parameter.shape for parameter in parameters]
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        zeros = [gradient.new_zeros((), dtype=dtype) for dtype in ctx.dtypes]
        return gradient, *(zero.expand(shape) for zero, shape in zip(zeros, ctx.shapes, strict=True))


@contextlib.contextmanager
def all_touched(model: nn.Module, loss: Tensor) -> Iterator[Tensor]:
    """A loss whose backward pass reaches each trained parameter of several denoisers, where DDP is to reduce gradients:
    it waits for all of them, and the last step calls one denoiser. `find_unused_parameters` would leave what the others
    have from earlier steps unreduced. Who got no gradient in the whole optimizer step has none afterwards either."""
    denoiser: Any = model.module if isinstance(model, DistributedDataParallel) else None
    if not isinstance(denoiser, Denoisers) or not model.require_backward_grad_sync:
        yield loss
        return
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    others = {name: part for name, part in parts_of(denoiser).items() if name != denoiser.last}
    idle = [p for part in others.values() for p in part.parameters() if p.requires_grad and p.grad is None]
    yield _Touched.apply(loss, *trained)
    for parameter in idle:
        parameter.grad = None


def compile_blocks(denoiser: ModelMixin, num_parties: int, **kwargs: Any) -> None:
    """Compiles the repeated blocks of a denoiser, in place: a graph for the student, and one for each adapter under
    which the blocks are asked.

    Args:
        denoiser ([`~diffusers.ModelMixin`]): Left in its place.
        num_parties (`int`): The student and its teachers, for torch's limit of graphs.
        kwargs: For [`~torch.nn.Module.compile`].

    Raises:
        ValueError: if the denoiser does not name its blocks.
    """
    # At its limit of graphs torch would go on without compiling, and say so once
    config = torch.compiler.config
    config.fail_on_recompile_limit_hit = True
    config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_PARTY * num_parties)
    # As `ModelMixin.compile_repeated_blocks`, for the denoisers too (SD3's) that name no blocks for it
    names = denoiser._repeated_blocks or denoiser._no_split_modules or []
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"`torch_compile` compiles the repeated blocks of a denoiser, and {type(denoiser).__name__} names "
            "none; leave it out."
        )
    for block in blocks:
        block.compile(**kwargs)
