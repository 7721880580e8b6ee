"""
How the cost of one optimizer step (LoRA student, one pass) grows with LoRA teachers, denoising steps and resolution.

An optimizer step visits every teacher once, so more teachers are more samples; shown are time and operations a sample,
the peak of the tensors alive during the step on top of the weights, and the weights that the teachers add. Everybody
has guidance 4.5. The settings take turns within one run; ratios are to the first of a group.

    python -m benchmarks.growth                      # the toy model, on any machine
    python -m benchmarks.growth --model sd35-medium  # SD3.5-Medium, on a GPU
"""

from functools import partial

from benchmarks.common import (
    GUIDANCE,
    MODELS,
    arguments,
    build,
    count_flops,
    interleave,
    machine,
    one_pass,
    optimizer_step,
    peak_memory,
    ratios,
    spread,
)

parser = arguments(__doc__)
parser.add_argument("--groups", nargs="+", default=["num_teachers", "steps", "resolution"])
options = parser.parse_args()

native = MODELS[options.model].resolution
groups = {
    "num_teachers": [1, 3, 8],
    "steps": [5, 10, 20, 40],
    "resolution": [native, native * 3 // 2, native * 2],
}
print(machine(options.device))
for group in options.groups:
    print(f"\n{options.model}, {options.batch} samples a teacher, by {group}")
    all_settings, runs, times_a_sample = {}, {}, {}
    for value in groups[group]:
        all_settings[value] = {"num_teachers": 3, "batch": options.batch, "teacher_guidance": [GUIDANCE], group: value}
        parties = build(options.model, options.device, options.seed, **all_settings[value])
        runs[value] = partial(optimizer_step, parties, one_pass)
    times = interleave(runs, options.repetitions)
    for value, run in runs.items():
        settings, parties = all_settings[value], run.args[0]
        samples = settings["batch"] * settings["num_teachers"]
        times_a_sample[value] = [(wall * 1000 / samples, cpu * 1000 / samples) for wall, cpu in times[value]]
        over_first = spread(ratios(times_a_sample[value], times_a_sample[groups[group][0]], clock=1))
        wall, cpu = (spread([t[clock] for t in times_a_sample[value]], ".0f") for clock in (0, 1))
        operations = count_flops(options.model, one_pass, lora=True, checkpointing=False, **settings) / samples
        weights = {name: p.nbytes for name, p in parties.teacher.transformer.named_parameters()}
        adapters = sum(size for name, size in weights.items() if ".teacher_" in name)
        print(
            f"  {value:5d}: ms a sample: wall {wall}, CPU {cpu}, x first {over_first}; "
            f"{operations / 1e9:.2f} GFLOP a sample; peak {peak_memory(run, options.device) / 2**20:.1f} MiB; "
            f"teachers {adapters / 2**20:.1f} MiB beside {(sum(weights.values()) - adapters) / 2**20:.1f} MiB"
        )
