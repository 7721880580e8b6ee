"""
What a run costs before it is started: operations, memory and bytes sent of one process in one optimizer step.

    python -m benchmarks.scale

These are formulas, and counts of the published pipelines (benchmarks/footprint.py), which take some minutes. A machine
without GPUs can check some of them: operations against counted ones, bytes on the wire against those of two processes,
memory of a step against that of a small one (tests/test_benchmarks.py, tests/test_distributed.py). Seconds are a model,
not a measurement: operations at `UTILISATION` of the peak, plus bytes at the bandwidth, without overlap.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.footprint import PIPELINES, activations, decoding, parameters

GPUS_A_NODE = 8
# One H100 SXM: dense bfloat16 peak (989 TFLOP/s), NVLink in one direction, and its share of the network between nodes
PEAK, NVLINK, NETWORK = 989e12, 450e9, 50e9
UTILISATION = 0.4
GIB = 2**30
CONTEXT = GIB  # what CUDA itself takes: context, libraries
CARDS = (16, 24, 32, 40, 48, 80, 141)  # GiB, which vendors write as GB
FREE = 0.1  # of a card, for what is not counted: workspaces, fragments, a desktop


@dataclass(frozen=True)
class Denoiser:
    """
    Sizes of an MM-DiT.

    Args:
        parameters (`float`): All of them.
        layers, width (`int`): Of the blocks; each token meets `12 width^2` weights in a block.
        picture, text (`int`): Tokens.
        dual (`int`): Blocks with a second attention over the picture alone.
        single (`int`): Blocks with one stream for picture and text, whose attention has no projection of its own.
        rank (`int`): Of a LoRA on the attention of both streams.
        guidance (`int`): Predictions of one guided prediction.
    """

    name: str
    parameters: float
    layers: int
    width: int
    picture: int = 4096  # of 1024 x 1024 pixels
    text: int = 512
    dual: int = 0
    single: int = 0
    rank: int = 32
    guidance: int = 2

    @property
    def forward(self) -> float:
        """Operations of one prediction of one sample: two for each weight that a token meets, and the two products of
        attention."""
        tokens = self.picture + self.text
        blocks = self.layers * (24 * self.width**2 * tokens + 4 * tokens**2 * self.width)
        return blocks + self.dual * (8 * self.width**2 * self.picture + 4 * self.picture**2 * self.width)

    @property
    def lora(self) -> float:
        """Parameters: two matrices on each of four projections, in two streams; three projections in one."""
        projections = (self.layers - self.single) * 2 * 4 + self.single * 3
        return projections * 2 * self.width * self.rank


@dataclass(frozen=True)
class Run:
    """
    Args:
        denoiser (`Denoiser`): Of the student, and of teachers that are whole.
        teachers (`int`): How many; an optimizer step visits each `cycles` times.
        whole_teachers (`bool`): Whether each has a denoiser of its own; else they are adapters.
        full (`bool`): Whether the student's denoiser is trained; else a LoRA.
        engine (`str`): `"ddp"`, `"zero1"`, `"zero2"`, `"zero3"` or `"fsdp2"`.
        nodes, gpus_a_node (`int`): A process each.
        placement (`str`): Of whole teachers: `"device"`, `"cpu"` or `"sharded"`.
        sync_each_batch (`bool`): FSDP2 reduces gradients in each backward pass.
        batch, learnt, cycles: Samples of a micro-batch, learnt steps, micro-batches of a task in an optimizer step.
    """

    denoiser: Denoiser
    teachers: int = 3
    whole_teachers: bool = False
    full: bool = False
    engine: str = "ddp"
    nodes: int = 1
    gpus_a_node: int = GPUS_A_NODE
    placement: str = "device"
    sync_each_batch: bool = False
    batch: int = 2
    learnt: int = 9
    cycles: int = 1

    @property
    def processes(self) -> int:
        return self.nodes * self.gpus_a_node

    @property
    def shards(self) -> bool:
        return self.engine in ("zero3", "fsdp2")

    @property
    def trained(self) -> float:
        return self.denoiser.parameters if self.full else self.denoiser.lora

    @property
    def backwards(self) -> int:
        """Backward passes of an optimizer step, each with its forward pass and one question to a teacher."""
        return self.teachers * self.cycles * self.learnt

    @property
    def operations(self) -> float:
        """A backward pass costs twice a forward pass for a whole denoiser; under a LoRA once, for the activations. The
        activations of big students are recomputed: one forward pass more."""
        backward = 2 if self.full else 1
        student = 1 + backward + 1
        return self.backwards * self.batch * self.denoiser.guidance * (student + 1) * self.denoiser.forward

    @property
    def memory(self) -> float:
        """Bytes of weights, gradients and AdamW on one GPU, without activations: frozen weights in bfloat16; trained
        ones in float32, with gradient and two moments. FSDP2 holds whole gradients until an optimizer step's last
        backward pass, unless `sync_each_batch` is set."""
        n = self.processes
        # Of the 16 bytes of a parameter
        sharded = {"ddp": 0, "zero1": 8, "zero2": 12, "zero3": 16, "fsdp2": 16 if self.sync_each_batch else 12}
        sharded = sharded[self.engine]
        trained = self.trained * (16 - sharded + sharded / n)
        frozen = 0.0 if self.full else 2 * self.denoiser.parameters
        adapters = 0.0 if self.whole_teachers else 2 * self.denoiser.lora * self.teachers
        waiting = 0.0
        if self.whole_teachers:
            alive = {"device": self.teachers, "cpu": 1, "sharded": self.teachers / n}[self.placement]
            waiting = 2 * self.denoiser.parameters * alive
        elif self.full:  # one frozen copy hosts the adapters
            waiting = 2 * self.denoiser.parameters / (n if self.placement == "sharded" else 1)
        return trained + (frozen + adapters) / (n if self.shards else 1) + waiting

    @property
    def gathers(self) -> int:
        """How often the weights of a whole denoiser come together in an optimizer step: for each forward and each
        backward pass if the student's are sharded, and for each question to a LoRA teacher, which lives in them, or to
        a sharded one."""
        student = 2 if self.shards else 0
        lives_in_shards = self.shards and not self.full and not self.whole_teachers
        return self.backwards * (student + (lives_in_shards or self.placement == "sharded"))

    @property
    def sent(self) -> float:
        """Bytes that one process sends in an optimizer step, with ring algorithms: `(n - 1) / n` of a tensor for an
        all-gather or a reduce-scatter, twice that for an all-reduce."""
        share = (self.processes - 1) / self.processes
        gradients = 4 * self.trained
        reductions = {"ddp": 2, "zero1": 2, "zero2": 2 * self.backwards, "zero3": self.backwards}
        reductions["fsdp2"] = self.backwards if self.sync_each_batch else 1
        total = share * gradients * reductions[self.engine]
        if self.engine in ("zero1", "zero2"):
            total += share * 4 * self.trained  # the updated weights
        return total + share * self.gathers * 2 * self.denoiser.parameters

    @property
    def seconds(self) -> float:
        return self.operations / (UTILISATION * PEAK) + self.sent / (NVLINK if self.nodes == 1 else NETWORK)


def published(name: str, **sizes: int) -> Denoiser:
    return Denoiser(name, parameters(name)["denoiser"], **sizes)


def memory_in_all(run: Run, pixels: int = 1024, checkpointing: bool = True, without: str = "") -> dict[str, float]:
    """Bytes on one GPU at the fullest moment of a run whose model is published: learning, or drawing sample pictures.

    Args:
        run (`Run`): Its `batch` is that of a micro-batch.
        pixels (`int`): Of a side.
        checkpointing (`bool`): Whether activations are recomputed.
        without (`str`): A text encoder that is left out.
    """
    model = run.denoiser
    others = sum(n for part, n in parameters(model.name).items() if part not in ("denoiser", without))
    learning = activations(model.name, pixels, run.batch, model.text, not run.full, checkpointing)
    if run.shards:  # the gathered weights of two blocks
        learning += 2 * 2 * model.parameters / model.layers
    elif run.full and run.engine == "ddp":  # autocast's copies; other engines cast for themselves
        learning += 2 * model.parameters
    # By default two of each of three tasks, in one batch of a process
    drawing = decoding(model.name, pixels, -(-6 // run.processes))
    parts = {"weights, optimizer": run.memory, "encoders, VAE": 2 * others, "learning": learning, "drawing": drawing}
    return parts | {"in all": run.memory + 2 * others + max(learning, drawing) + CONTEXT}


def table(title: str, runs: dict[str, Run]) -> None:
    head = ["", "GiB: weights, optimizer", "GiB in all", "PFLOP", "GiB sent", "s a step"]
    spread_out = any(run.nodes > 1 for run in runs.values())
    head += ["of one node's speed"] * spread_out
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, run in runs.items():
        cells = [name, f"{run.memory / GIB:.1f}", f"{memory_in_all(run)['in all'] / GIB:.0f}"]
        cells += [f"{run.operations / 1e15:.1f}", f"{run.sent / GIB:.2f}", f"{run.seconds:.0f}"]
        cells += [f"{dataclasses.replace(run, nodes=1).seconds / run.seconds:.2f}"] * spread_out
        print(f"| {' | '.join(cells)} |", flush=True)


def memory_table(title: str, runs: list[tuple[str, Run, int, bool, str]]) -> None:
    """A card is for the default pictures, and, where that is a smaller one, for none."""
    head = ["LoRA student", "card", "in all", "weights", "learning", "drawing"]
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, run, pixels, checkpointing, without in runs:
        parts = memory_in_all(run, pixels, checkpointing, without)
        needed = [parts["in all"], parts["in all"] - max(0, parts["drawing"] - parts["learning"])]
        fitting = [[f"{card} GB" for card in CARDS if (1 - FREE) * card * GIB >= least] for least in needed]
        cards = dict.fromkeys(cards[0] if cards else "none" for cards in fitting)
        row = f"{name}, {pixels} px{f', batch {run.batch}' * (run.batch > 1)}{', recomputed' * checkpointing}"
        shown = {part: f"{size / GIB:.1f}" for part, size in parts.items()}
        weights = f"{shown['weights, optimizer']} + {shown['encoders, VAE']}"
        cells = [row, " / ".join(cards), shown["in all"], weights, shown["learning"], shown["drawing"]]
        print(f"| {' | '.join(cells)} |", flush=True)


def moments(run: Run, frozen: float, pixels: int) -> dict[str, float]:
    """Bytes on one GPU at the fullest moments of a run with `encode_ahead`, activations recomputed: encoders and VAE
    are there as calls begin and pictures are drawn, and not while the student learns.

    Args:
        run (`Run`): Of a LoRA student with LoRA teachers.
        frozen (`float`): Bytes of its denoiser's frozen weights.
        pixels (`int`): Of a side.
    """
    parts = memory_in_all(run, pixels)
    weights = parts["weights, optimizer"] - 2 * run.denoiser.parameters + frozen + CONTEXT
    others = parts["encoders, VAE"]
    return {
        "as calls begin": weights + others,
        "learning": weights + parts["learning"],
        "drawing": weights + others + parts["drawing"],
        "learning, without `encode_ahead`": weights + others + parts["learning"],
    }


def moments_table(title: str, runs: list[Run], bits: Sequence[str]) -> None:
    """The card is for a run without pictures."""
    quantised = importlib.import_module("benchmarks.quantised")  # which needs more than the others here
    with torch.device("meta"):
        denoisers = {run.denoiser.name: PIPELINES[run.denoiser.name].denoiser() for run in runs}
    head = [
        "LoRA student, 1024 px",
        "card",
        "as calls begin",
        "learning",
        "drawing",
        "learning, without `encode_ahead`",
    ]
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for run in runs:
        for way in bits:
            found = moments(run, quantised.weights(denoisers[run.denoiser.name], way), pixels=1024)
            needed = max(found["as calls begin"], found["learning"])
            card = next((f"{card} GB" for card in CARDS if (1 - FREE) * card * GIB >= needed), "none")
            cells = [f"{run.denoiser.name}, {way}", card, *(f"{size / GIB:.1f}" for size in found.values())]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    MODELS = [
        published("SD3.5-Medium", layers=24, width=1536, text=333, dual=13),
        published("FLUX.1-dev", layers=57, width=3072, single=38, guidance=1),
        published("Qwen-Image", layers=60, width=3072),
    ]
    SD35, FLUX, QWEN = (Run(model, batch=1, gpus_a_node=1) for model in MODELS)
    memory_table(
        "Memory of one GPU in GiB: 3 LoRA teachers",
        [
            ("SD3.5-Medium, no T5", SD35, 512, True, "T5-XXL"),
            ("SD3.5-Medium, no T5", SD35, 1024, True, "T5-XXL"),
            ("SD3.5-Medium", SD35, 512, True, ""),
            ("SD3.5-Medium", dataclasses.replace(SD35, batch=3), 512, True, ""),
            ("SD3.5-Medium", dataclasses.replace(SD35, batch=3), 512, False, ""),
            ("SD3.5-Medium", SD35, 1024, True, ""),
            ("SD3.5-Medium", SD35, 1024, False, ""),
            ("FLUX.1-dev", FLUX, 512, True, ""),
            ("FLUX.1-dev", FLUX, 512, False, ""),
            ("FLUX.1-dev", FLUX, 1024, True, ""),
            ("FLUX.1-dev", FLUX, 1024, False, ""),
            ("Qwen-Image", QWEN, 512, True, ""),
            ("Qwen-Image", QWEN, 1024, True, ""),
            ("Qwen-Image", QWEN, 1024, False, ""),
        ],
    )
    moments_table(
        "With `encode_ahead`, by what the denoiser is held in: 3 LoRA teachers, GiB",
        [SD35, FLUX, QWEN],
        ("bfloat16", "LLM.int8", "NF4"),
    )
    table(
        "Students and engines: 3 LoRA teachers, one node",
        {
            f"{model.name}, {'full' if full else 'LoRA'}, {engine}{', each backward' if each else ''}": Run(
                model, full=full, engine=engine, sync_each_batch=each
            )
            for model in MODELS
            for full, engine, each in [
                *((False, engine, False) for engine in ("ddp", "fsdp2")),
                *((True, engine, False) for engine in ("zero2", "zero3", "fsdp2")),
                (True, "fsdp2", True),
            ]
        },
    )
    table(
        "Teachers: LoRA student of FLUX.1's size, FSDP2, one node",
        {
            f"{count} {kind}": Run(MODELS[1], count, kind != "LoRA", engine="fsdp2", placement=placement)
            for kind, placement in [("LoRA", "device"), ("whole", "device"), ("whole, cpu", "cpu")]
            + [("whole, sharded", "sharded")]
            for count in (1, 3, 8)
        },
    )
    table(
        "Nodes of eight GPUs: 3 LoRA teachers",
        {
            f"{model.name}, {'full, fsdp2' if full else 'LoRA, ddp'}, {nodes} x 8": Run(
                model, full=full, engine="fsdp2" if full else "ddp", nodes=nodes
            )
            for model in MODELS
            for full in (False, True)
            for nodes in (1, 8, 64)
        },
    )
