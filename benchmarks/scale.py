"""
What a run costs before it is started: operations, memory and bytes sent of one process in one optimizer step.

    python -m benchmarks.scale

These are formulas. A machine without GPUs can check some of them: operations against counted ones, and bytes on the
wire against those of two processes (tests/test_benchmarks.py, tests/test_distributed.py). Seconds are a model, not a
measurement: operations at `UTILISATION` of the peak, plus bytes at the bandwidth, without overlap.
"""

import dataclasses
from dataclasses import dataclass

GPUS_A_NODE = 8
# One H100 SXM: dense bfloat16 peak (989 TFLOP/s), NVLink in one direction, and its share of the network between nodes
PEAK, NVLINK, NETWORK = 989e12, 450e9, 50e9
UTILISATION = 0.4
GIB = 2**30


@dataclass(frozen=True)
class Denoiser:
    """
    Sizes of an MM-DiT.

    Args:
        parameters (`float`): All of them.
        layers, width (`int`): Of the blocks; each token meets `12 width^2` weights in a block.
        picture, text (`int`): Tokens.
        dual (`int`): Blocks with a second attention over the picture alone.
        rank (`int`): Of a LoRA on the attention of both streams.
    """

    name: str
    parameters: float
    layers: int
    width: int
    picture: int = 4096  # of 1024 x 1024 pixels
    text: int = 512
    dual: int = 0
    rank: int = 32

    @property
    def forward(self) -> float:
        """Operations of one prediction of one sample: two for each weight that a token meets, and the two products of
        attention."""
        tokens = self.picture + self.text
        blocks = self.layers * (24 * self.width**2 * tokens + 4 * tokens**2 * self.width)
        return blocks + self.dual * (8 * self.width**2 * self.picture + 4 * self.picture**2 * self.width)

    @property
    def lora(self) -> float:
        """Parameters: two matrices on each of four projections, in two streams."""
        return self.layers * 2 * 4 * 2 * self.width * self.rank


@dataclass(frozen=True)
class Run:
    """
    Args:
        denoiser (`Denoiser`): Of the student, and of teachers that are whole.
        teachers (`int`): How many; an optimizer step visits each `cycles` times.
        whole_teachers (`bool`): Whether each has a denoiser of its own; else they are adapters.
        full (`bool`): Whether the student's denoiser is trained; else a LoRA.
        engine (`str`): `"ddp"`, `"zero1"`, `"zero2"`, `"zero3"` or `"fsdp2"`.
        nodes (`int`): Of `GPUS_A_NODE` processes each.
        placement (`str`): Of whole teachers: `"device"`, `"cpu"` or `"sharded"`.
        sync_each_batch (`bool`): FSDP2 reduces gradients in each backward pass.
        batch, learnt, guidance, cycles: Samples of a micro-batch, learnt steps, predictions of one guided prediction,
            micro-batches of a task in an optimizer step.
    """

    denoiser: Denoiser
    teachers: int = 3
    whole_teachers: bool = False
    full: bool = False
    engine: str = "ddp"
    nodes: int = 1
    placement: str = "device"
    sync_each_batch: bool = False
    batch: int = 2
    learnt: int = 9
    guidance: int = 2
    cycles: int = 1

    @property
    def processes(self) -> int:
        return self.nodes * GPUS_A_NODE

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
        return self.backwards * self.batch * self.guidance * (student + 1) * self.denoiser.forward

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


MODELS = [
    Denoiser("SD3.5-Medium", 2.5e9, layers=24, width=1536, text=333, dual=13),
    Denoiser("FLUX.1", 12e9, layers=57, width=3072),
    Denoiser("Qwen-Image", 20e9, layers=60, width=3072),
]


def table(title: str, runs: dict[str, Run]) -> None:
    head = ["", "GiB a GPU", "PFLOP", "GiB sent", "s a step"]
    spread_out = any(run.nodes > 1 for run in runs.values())
    head += ["of one node's speed"] * spread_out
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, run in runs.items():
        cells = [name, f"{run.memory / GIB:.1f}", f"{run.operations / 1e15:.1f}", f"{run.sent / GIB:.2f}"]
        cells += [f"{run.seconds:.0f}"]
        cells += [f"{dataclasses.replace(run, nodes=1).seconds / run.seconds:.2f}"] * spread_out
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
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
