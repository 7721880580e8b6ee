"""
Cost of one optimizer step: rollout and gradient in one pass, against the released recipe's two passes.

Same model, same batch, same noise, same machine; the two ways take turns within one run. Shown are the median and the
range of the ratios of all repetitions, the ratio of the floating-point operations (counted, no machine in it), and the
peak of the tensors alive during the step, on top of weights and optimizer state.

    python -m benchmarks.step_cost                                   # the toy model, on any machine
    python -m benchmarks.step_cost --model sd35-medium               # SD3.5-Medium at 512 x 512, on a GPU
    python -m benchmarks.step_cost --model sd35-medium --only-flops  # its operations alone, without a GPU
"""

from functools import partial

from benchmarks.common import (
    arguments,
    build,
    check_equal,
    count_flops,
    interleave,
    machine,
    one_pass,
    optimizer_step,
    peak_memory,
    ratios,
    spread,
    two_pass,
)

WAYS = {"two passes": two_pass, "two passes, lean": partial(two_pass, lean=True), "one pass": one_pass}

parser = arguments(__doc__)
parser.add_argument("--students", nargs="+", choices=["lora", "full"], default=["lora", "full"])
parser.add_argument("--checkpointing", nargs="+", choices=["no", "yes"], default=["no", "yes"])
parser.add_argument("--steps", type=int, default=10, help="denoising steps; the first int(0.99 steps) are learnt")
parser.add_argument("--only-flops", action="store_true")
options = parser.parse_args()

print(machine(options.device))
for student in options.students:
    for checkpointing in options.checkpointing:
        settings = dict(
            lora=student == "lora", checkpointing=checkpointing == "yes", batch=options.batch, steps=options.steps
        )
        print(f"\n{options.model}, {student}, activation checkpointing {checkpointing}, {options.batch} x 3 samples")
        counted = {name: count_flops(options.model, way, **settings) for name, way in WAYS.items()}
        for name, count in counted.items():
            print(f"  {name:17s} {count / 1e9:12.1f} GFLOP, {count / counted['one pass']:.3f} x one pass")
        if options.only_flops:
            continue
        parties = build(options.model, options.device, options.seed, **settings)
        loss, gradient = check_equal(parties)
        print(f"  relative difference of the two ways: loss {loss:.1e}, gradient {gradient:.1e}")
        arms = {name: partial(optimizer_step, parties, way) for name, way in WAYS.items()}
        times = interleave(arms, options.repetitions)
        for name, run in arms.items():
            wall, cpu = (spread([t[clock] * 1000 for t in times[name]], ".0f") for clock in (0, 1))
            memory = peak_memory(run, options.device) / 2**20
            print(f"  {name:17s} ms a step: wall {wall}, CPU {cpu}; peak {memory:.1f} MiB")
            if name != "one pass":
                wall, cpu = (spread(ratios(times[name], times["one pass"], clock)) for clock in (0, 1))
                print(f"  {'':17s} over one pass: wall {wall}, CPU {cpu}")
        del parties, arms
