"""Prompts and teachers go together by data, tasks come in turn, in the same order in any number of processes."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset, DatasetDict, IterableDataset
from torch.utils.data import DataLoader

from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
from diffusion_opd.data import routed_dataset
from diffusion_opd.sampling import TaskCycleSampler, TaskCycleStream, seed_of
from tests.tiny_pipelines import BUILDERS, CALL

IDS = ["aes", "ocr", "geneval"]
TASKS = ["aes"] * 7 + ["ocr"] * 3 + ["geneval"] * 5


def prompts_of(task: str, count: int):
    for number in range(count):
        yield {"prompt": f"{task} {number}"}


def stream(task: str, count: int) -> IterableDataset:
    return IterableDataset.from_generator(prompts_of, gen_kwargs={"task": task, "count": count})


def mixed_rows(order: tuple[str, ...]):
    for number, task in enumerate(order):
        yield {"prompt": f"{task} {number}", "teacher_id": task}


def mixed_stream(order: list[str]) -> IterableDataset:
    # A list would mean shards to be read one after the other
    return IterableDataset.from_generator(mixed_rows, gen_kwargs={"order": tuple(order)})


def loader(data, batch: int, processes: int = 1, rank: int = 0, cycles: int = 1, seed: int = 0, **kwargs):
    """The dataloader of one process, made and sharded as Trainer does it."""
    rows = [{"row": row, "task": task} for row, task in enumerate(TASKS)] if data is None else data
    sampler = TaskCycleSampler(TASKS, IDS, batch * processes, cycles, seed) if data is None else None
    return prepare_data_loader(
        DataLoader(rows, batch_size=batch, sampler=sampler, collate_fn=list, **kwargs),
        num_processes=processes,
        process_index=rank,
        put_on_device=False,
        rng_types=None,
        dispatch_batches=False,
    )


def batches(dataloader, epoch: int = 0) -> list[list[dict]]:
    dataloader.set_epoch(epoch)
    return list(dataloader)


# The cycle


@pytest.mark.parametrize("cycles", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_an_epoch_is_whole_optimizer_steps_of_whole_cycles(batch: int, cycles: int):
    epoch = batches(loader(None, batch, cycles=cycles))
    tasks = [{example["task"] for example in micro_batch} for micro_batch in epoch]
    assert tasks == [{task} for task, _ in zip(itertools.cycle(IDS), tasks, strict=False)]  # one each, in turn
    assert {len(micro_batch) for micro_batch in epoch} == {batch}
    steps, rest = divmod(len(epoch), cycles * len(IDS))
    assert rest == 0
    assert {example["row"] for micro_batch in epoch for example in micro_batch} == set(range(len(TASKS)))
    # The smallest such number: one optimizer step fewer could not show the seven rows of the largest task
    assert steps * cycles * batch >= 7 > (steps - 1) * cycles * batch


def test_rows_of_a_task_are_seen_equally_often():
    seen = Counter(example["row"] for micro_batch in batches(loader(None, 4, cycles=3)) for example in micro_batch)
    for task in IDS:
        counts = [seen[row] for row, owner in enumerate(TASKS) if owner == task]
        assert max(counts) - min(counts) <= 1


def test_the_order_is_a_function_of_seed_and_epoch():
    same = loader(None, 2)
    orders = {epoch: batches(same, epoch) for epoch in (0, 1, 2)}
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert batches(same, 0) == orders[0]  # no memory of the epochs before
    assert batches(loader(None, 2), 2) == orders[2]
    assert batches(loader(None, 2, seed=1), 0) not in orders.values()


def test_seeds_of_neighbours_are_unrelated():
    seeds = {seed_of(*numbers) for numbers in itertools.product(range(5), repeat=3)}
    assert len(seeds) == 125 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, 1) != seed_of(1, 0)
    # The high bits differ too: the mean of uniform numbers, whose standard deviation here is 0.026
    assert abs(sum(seeds) / 125 / 2**63 - 0.5) < 0.1


@pytest.mark.parametrize(("processes", "batch", "cycles"), [(2, 2, 1), (2, 1, 3), (4, 1, 2)])
def test_processes_share_what_one_process_sees(processes: int, batch: int, cycles: int):
    one = loader(None, batch * processes, cycles=cycles)
    ranks = [loader(None, batch, processes, rank, cycles) for rank in range(processes)]
    for epoch in range(3):
        together = [sum(parts, []) for parts in zip(*(batches(rank, epoch) for rank in ranks), strict=True)]
        assert together == batches(one, epoch)


@pytest.mark.parametrize("skipped", [1, 5])
def test_skipping_what_was_seen_goes_on_where_it_stopped(skipped: int):
    whole = batches(loader(None, 2), 1)
    assert batches(skip_first_batches(loader(None, 2), skipped), 1) == whole[skipped:]


# Groups: samples of one prompt


def sampler(**kwargs) -> TaskCycleSampler:
    return TaskCycleSampler(TASKS, IDS, **(dict(batch_size=4, cycles=3, seed=0) | kwargs))


def by_step(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@pytest.mark.parametrize(("batch", "cycles", "repeats"), [(4, 3, 2), (4, 3, 6), (2, 3, 6), (1, 4, 4), (6, 1, 3)])
def test_a_group_lies_in_one_task_and_one_step(batch: int, cycles: int, repeats: int):
    rows = list(sampler(batch_size=batch, cycles=cycles, repeats=repeats))
    for step in by_step(rows, len(IDS) * batch * cycles):
        micro_batches = by_step(step, batch)
        assert [{TASKS[row] for row in rows} for rows in micro_batches] == [{task} for task in IDS * cycles]
        for task in range(len(IDS)):  # a group may lie in several micro-batches of its task
            own = sum(micro_batches[task :: len(IDS)], [])
            assert all(len(set(group)) == 1 for group in by_step(own, repeats))


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(("batch", "cycles", "repeats"), [(4, 3, 6), (1, 2, 2), (8, 2, 4)])
def test_an_epoch_of_groups_shows_every_row(batch: int, cycles: int, repeats: int, iterations: int):
    data = sampler(batch_size=batch, cycles=cycles, repeats=repeats, iterations=iterations)
    rows = list(data)
    steps = by_step(rows, len(IDS) * batch * cycles)
    assert len(rows) == len(data) == len(steps) * len(IDS) * batch * cycles
    assert steps == [step for step in steps[::iterations] for _ in range(iterations)]
    assert set(rows) == set(range(len(TASKS)))
    rollouts = len(steps) // iterations
    assert rollouts * cycles * batch >= 7 * repeats > (rollouts - 1) * cycles * batch  # the smallest such number


def test_groups_come_in_a_new_order_each_epoch():
    data = sampler(repeats=3, iterations=2)
    orders = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        orders.append(list(data))
    assert orders[0] == orders[2] != orders[1]
    assert list(sampler(repeats=3, iterations=2, seed=1)) not in orders


@pytest.mark.parametrize(("repeats", "iterations"), [(1, 1), (3, 1), (1, 2), (6, 2)])
def test_a_stream_of_groups_is_as_its_dataset(repeats: int, iterations: int):
    """Each prompt so many times in succession within its task, each optimizer step so many times."""
    counts = {"aes": 4, "ocr": 3}
    streams = {task: stream(task, count) for task, count in counts.items()}
    cycle = TaskCycleStream(streams, list(counts), 2, cycles=3, repeats=repeats, iterations=iterations, column="task")
    steps = by_step(list(itertools.islice(cycle, 12 * 4 * iterations)), 12)
    assert steps == [step for step in steps[::iterations] for _ in range(iterations)]
    for task, count in counts.items():
        own = [e["prompt"] for step in steps[::iterations] for e in step if e["task"] == task]
        assert own == [f"{task} {i // repeats % count}" for i in range(len(own))]
    micro_batches = by_step(sum(steps, []), 2)
    assert [{e["task"] for e in batch} for batch in micro_batches] == [{t} for t in counts] * (len(micro_batches) // 2)


def test_a_stream_keeps_its_columns_under_another_name_of_the_task():
    rows = IterableDataset.from_generator(
        lambda: iter([{"prompt": "a", "task": "aes", "n": 1}, {"prompt": "b", "task": "ocr", "n": 2}])
    )
    cycle = TaskCycleStream(rows, ["aes", "ocr"], 1, repeats=2, cycles=2, column="task")
    first = [{"prompt": "a", "task": "aes", "n": 1}, {"prompt": "b", "task": "ocr", "n": 2}]
    assert list(itertools.islice(cycle, 4)) == first * 2


RESUMED_RUN = """
import json, sys
from pathlib import Path
import tests.conftest
from datasets import Dataset
from peft import LoraConfig
from tests.cpu_engines import leave
from tests.tiny_pipelines import BUILDERS, CALL, LORA_TARGETS
from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer

out, checkpoint = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
seen = []


class Recorder(DiffusionOPDTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        seen.append([example["prompt"] for example in inputs])
        return super().training_step(model, inputs, num_items_in_batch)


trainer = Recorder(
    BUILDERS["sd3"](0),
    {task: BUILDERS["sd3"](seed) for seed, task in enumerate(["a", "b"], start=1)},
    DiffusionOPDConfig(
        str(out), per_device_train_batch_size=1, max_steps=8, save_steps=5, report_to="none", use_cpu=True,
        num_inference_steps=1, call_kwargs=CALL["sd3"], disable_tqdm=True, image_steps=0,
    ),
    train_dataset=Dataset.from_dict({"prompt": [f"{i}" for i in range(12)], "teacher_id": ["a", "b"] * 6}),
    peft_config=LoraConfig(r=2, target_modules=LORA_TARGETS),
)
trainer.train(resume_from_checkpoint=checkpoint)
assert trainer.accelerator.num_processes == 2
everyone = trainer.accelerator.gather_for_metrics([seen], use_gather_object=True)
if trainer.is_world_process_zero():
    Path(out, "seen.json").write_text(json.dumps(everyone))
trainer.end()
leave()
"""


@pytest.mark.slow
def test_two_processes_resume_in_the_middle_of_an_epoch(tmp_path):
    """An epoch is 3 optimizer steps, so the checkpoint of step 5 lies inside the second one."""
    script = tmp_path / "run.py"
    script.write_text(RESUMED_RUN)

    def run(*arguments: str) -> list[list]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(Path(arguments[0], "seen.json").read_text())

    undisturbed = run(str(tmp_path / "out"))
    resumed = run(str(tmp_path / "again"), str(tmp_path / "out" / "checkpoint-5"))
    assert len(undisturbed) == 2 and undisturbed[0] != undisturbed[1]
    assert [len(rank) for rank in resumed] == [6, 6]
    assert resumed == [rank[10:] for rank in undisturbed]


# Streams


def test_a_stream_for_each_task_comes_in_turn_and_starts_again():
    cycle = TaskCycleStream({"aes": stream("aes", 3), "ocr": stream("ocr", 2)}, ["aes", "ocr"], batch_size=2)
    examples = list(itertools.islice(cycle, 12))
    assert [example["teacher_id"] for example in examples] == (["aes"] * 2 + ["ocr"] * 2) * 3
    assert [e["prompt"] for e in examples if e["teacher_id"] == "aes"] == [f"aes {i}" for i in (0, 1, 2, 0, 1, 2)]
    assert [e["prompt"] for e in examples if e["teacher_id"] == "ocr"] == [f"ocr {i}" for i in (0, 1, 0, 1, 0, 1)]


def test_one_mixed_stream_is_sorted_by_its_tasks_without_losing_any():
    order = ["ocr", "ocr", "ocr", "aes", "geneval", "aes", "geneval", "aes", "geneval"]
    cycle = TaskCycleStream(mixed_stream(order), IDS, batch_size=1)
    examples = list(itertools.islice(cycle, 18))
    assert [example["teacher_id"] for example in examples] == IDS * 6
    assert all(example["prompt"].startswith(example["teacher_id"]) for example in examples)
    for task in IDS:  # two passes, each in the stream's own order
        rows = [int(example["prompt"].split()[1]) for example in examples if example["teacher_id"] == task]
        assert rows == [row for row, owner in enumerate(order) if owner == task] * 2


def test_a_stream_that_shuffles_shuffles_anew_each_time_round():
    cycle = TaskCycleStream({"aes": stream("aes", 20).shuffle(seed=0, buffer_size=20)}, ["aes"], batch_size=1)
    prompts = [example["prompt"] for example in itertools.islice(cycle, 40)]
    assert sorted(prompts[:20]) == sorted(prompts[20:]) and prompts[:20] != prompts[20:]


@pytest.mark.parametrize("form", ["dict", "mixed"])
def test_processes_share_a_stream(form: str):
    def data(batch: int) -> TaskCycleStream:
        streams = {task: stream(task, 5) for task in IDS} if form == "dict" else mixed_stream(TASKS)
        return TaskCycleStream(streams, IDS, batch)

    def first(dataloader, count: int = 6) -> list[list[dict]]:
        return list(itertools.islice(dataloader, count))

    one = first(loader(data(4), 4))
    ranks = [first(loader(data(4), 2, processes=2, rank=rank)) for rank in (0, 1)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == one
    assert [{example["teacher_id"] for example in micro_batch} for micro_batch in one] == [{task} for task in IDS * 2]


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (["aes", "clip", "ocr"], ["clip", "aes", "ocr"]),
        (["aes", "aes"], ["no prompt", "ocr"]),
        ([], ["no example"]),
    ],
)
def test_a_stream_is_refused_where_it_goes_wrong(order: list[str], words: list[str]):
    with pytest.raises(ValueError) as refusal:
        list(itertools.islice(TaskCycleStream(mixed_stream(order), ["aes", "ocr"], 1), 4))
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("prompt", [None, "", "  ", ["a", "b"]])
def test_a_prompt_of_a_stream_is_text(prompt):
    rows = IterableDataset.from_generator(lambda: iter([{"prompt": prompt}]))
    with pytest.raises(
        ValueError, match="for task 'aes', must be text of whole characters that is not empty"
    ) as refusal:
        next(iter(TaskCycleStream({"aes": rows}, ["aes"], 1)))
    assert repr(prompt) in str(refusal.value)


def test_a_stream_is_read_by_one_worker_and_not_by_two():
    data = TaskCycleStream({task: stream(task, 4) for task in IDS}, IDS, 2)
    by_none, by_one = (list(itertools.islice(loader(data, 2, num_workers=count), 6)) for count in (0, 1))
    assert by_one == by_none
    by_two = iter(DataLoader(data, batch_size=2, num_workers=2, collate_fn=list))
    with pytest.raises(ValueError, match="dataloader_num_workers"):
        next(by_two)
    by_two._shutdown_workers()  # left to the garbage collector this takes 10 seconds


# Rows of one size


def grouped(sizes, batch_size=4, alike=2, repeats=1, cycles=1, tasks=None, epoch=0) -> list[list[int]]:
    tasks = tasks or ["a"] * len(sizes)
    own = TaskCycleSampler(
        tasks, sorted(set(tasks)), batch_size, cycles, seed=3, repeats=repeats, sizes=sizes, alike=alike
    )
    own.set_epoch(epoch)
    order = list(own)
    assert len(order) == len(own) and len(order) % (batch_size * cycles) == 0
    return [order[i : i + alike] for i in range(0, len(order), alike)]


@pytest.mark.parametrize("repeats", [1, 2, 4])
@pytest.mark.parametrize("counts", [(8, 8), (7, 1), (1, 1, 1, 1, 1), (5, 3, 2), (1, 20)])
def test_rows_of_one_size_come_together(counts, repeats):
    sizes = [number for number, count in enumerate(counts) for _ in range(count)]
    for epoch in range(3):
        groups = grouped(sizes, repeats=repeats, epoch=epoch)
        assert all(len({sizes[row] for row in group}) == 1 for group in groups)
        assert {row for group in groups for row in group} == set(range(len(sizes)))  # an epoch shows all
        samples = [row for group in groups for row in group]
        assert all(len(set(samples[i : i + repeats])) == 1 for i in range(0, len(samples), repeats))  # whole groups


def test_rows_of_one_size_are_in_the_order_of_rows_without():
    plain = TaskCycleSampler(["a"] * 10, ["a"], 4, 1, seed=3)
    assert [row for group in grouped([7] * 10) for row in group] == list(plain)


def test_no_size_is_shown_more_often_than_it_must_be():
    """Over several rounds each row comes equally often, but for what makes up the last batches."""
    sizes = [0] * 9 + [1] * 3
    shown = Counter(row for group in grouped(sizes, batch_size=24, alike=4) for row in group)
    assert max(shown.values()) - min(shown.values()) <= 2


def test_streams_wait_for_rows_of_one_size():
    rows = [{"prompt": f"row {number}", "size": number % 3} for number in range(9)]
    source = IterableDataset.from_generator(lambda: iter(rows))
    own = TaskCycleStream({"a": source}, ["a"], batch_size=2, size_of=lambda row: row["size"], alike=2)
    order = list(itertools.islice(own, 12))
    assert all(a["size"] == b["size"] for a, b in zip(order[::2], order[1::2], strict=True))
    assert len({row["prompt"] for row in order}) == 9


# What a user hands over


def test_columns_stay():
    data = Dataset.from_dict({"prompt": ["a", "b", "c"], "teacher_id": ["ocr", "aes", "ocr"], "seed": [1, 2, 3]})
    assert routed_dataset(data, ["aes", "ocr"], "train_dataset")[:] == data[:]


def test_one_teacher_needs_no_column():
    data = Dataset.from_dict({"prompt": ["a", "b"], "other": [0, 1]})
    assert routed_dataset(data, ["aes"], "train_dataset")[:] == data[:] | {"teacher_id": ["aes", "aes"]}
    named = data.add_column("teacher_id", ["aes", "aes"])
    assert routed_dataset(named, ["aes"], "train_dataset")[:]["teacher_id"] == ["aes", "aes"]


@pytest.mark.parametrize("how", ["shuffled", "filtered", "selected", "sorted by another", "sorted as it was"])
def test_rows_that_were_chosen_stay_in_their_order(how: str):
    data = Dataset.from_dict({"prompt": [f"prompt {i}" for i in range(9)], "n": [i % 4 for i in range(9)]})
    chosen = {
        "shuffled": lambda: data.shuffle(seed=1),
        "filtered": lambda: data.filter(lambda row: row["n"] != 1),
        "selected": lambda: data.select([7, 2, 2, 0]).select([3, 1]),
        "sorted as it was": lambda: data.sort("prompt"),
        "sorted by another": lambda: data.sort("n").remove_columns("n"),
    }[how]()
    routed = routed_dataset(chosen, ["ocr"], "train_dataset")
    assert list(routed) == [{**row, "teacher_id": "ocr"} for row in chosen]
    both = routed_dataset({"aes": data, "ocr": chosen}, ["aes", "ocr"], "train_dataset")
    assert [row["prompt"] for row in both][9:] == list(chosen["prompt"]) and set(both["teacher_id"][9:]) == {"ocr"}


def test_a_dict_names_the_tasks():
    data = {
        # pandas makes `large_string` of text, a dict `string`
        "ocr": Dataset.from_pandas(pandas.DataFrame({"prompt": ["a"], "target": ["A"]})),
        "aes": Dataset.from_dict({"prompt": ["b", "c"], "teacher_id": ["whoever", "whoever"], "target": ["B", "C"]}),
    }
    routed = routed_dataset(data, ["aes", "ocr"], "train_dataset")
    tasks = ["aes", "aes", "ocr"]
    assert routed[:] == {"prompt": ["b", "c", "a"], "teacher_id": tasks, "target": ["B", "C", "A"]}


def test_a_column_of_several_types_is_left_out(caplog):
    data = {
        "ocr": Dataset.from_dict({"prompt": ["a"], "id": ["first"]}),
        "aes": Dataset.from_dict({"prompt": ["b"], "id": [2]}),
    }
    routed = routed_dataset(data, ["aes", "ocr"], "train_dataset")
    assert routed[:] == {"prompt": ["b", "a"], "teacher_id": ["aes", "ocr"]}
    assert "The column 'id' of train_dataset has several types, and is left out" in caplog.text


def test_evaluation_needs_no_prompt_of_every_teacher():
    data = Dataset.from_dict({"prompt": ["a"], "teacher_id": ["ocr"]})
    assert len(routed_dataset(data, ["aes", "ocr"], "eval_dataset", need_all=False)) == 1
    assert len(routed_dataset({"ocr": data}, ["aes", "ocr"], "eval_dataset", need_all=False)) == 1
    with pytest.raises(ValueError, match="the data has"):
        routed_dataset(data, ["aes"], "eval_dataset", need_all=False)


def test_columns_of_tasks_stay():
    data = Dataset.from_dict({"prompt": ["a", "b"], "task": ["ocr", "aes"], "target": ["A", "B"]})
    keep = dict(column="task")
    assert routed_dataset(data, ["aes", "ocr"], "train_dataset", **keep)[:] == data[:]
    one = routed_dataset(data.remove_columns("task"), ["aes"], "train_dataset", **keep)
    assert one[:] == data[:] | {"task": ["aes", "aes"]}
    both = routed_dataset(
        {"ocr": Dataset.from_dict({"prompt": ["a"], "target": ["A"]}), "aes": Dataset.from_dict({"prompt": ["b"]})},
        ["aes", "ocr"],
        "train_dataset",
        **keep,
    )
    assert both[:] == {"prompt": ["b", "a"], "task": ["aes", "ocr"], "target": [None, "A"]}


def test_streams_for_evaluation_keep_their_columns():
    streams = {task: IterableDataset.from_generator(lambda: iter([{"prompt": "a", "n": 1}])) for task in ("aes", "ocr")}
    keep = dict(column="task", need_all=False)
    both = routed_dataset(streams, ["aes", "ocr"], "eval_dataset", **keep)
    assert list(both) == [{"prompt": "a", "n": 1, "task": task} for task in ("aes", "ocr")]
    single = routed_dataset(streams["aes"], ["aes"], "eval_dataset", **keep)
    assert list(single) == [{"prompt": "a", "n": 1, "task": "aes"}]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Dataset.from_dict({"prompt": ["a"]}), ["no column ['task']", "only ['prompt']; with several tasks"]),
        (
            Dataset.from_dict({"prompt": ["a"], "task": ["x"]}),
            ["the `task` column", "and the tasks of `reward_funcs` must name", "has ['x']", "are ['aes', 'ocr']"],
        ),
    ],
)
def test_data_without_its_tasks_is_refused(data, words: list[str]):
    with pytest.raises(ValueError) as refusal:
        routed_dataset(data, ["aes", "ocr"], "train_dataset", column="task")
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_streams_for_evaluation_come_as_one_with_their_tasks():
    both = routed_dataset({"ocr": stream("ocr", 1), "aes": stream("aes", 2)}, ["aes", "ocr"], "e", need_all=False)
    single = routed_dataset(stream("aes", 2), ["aes"], "eval_dataset", need_all=False)
    aes = [{"prompt": "aes 0", "teacher_id": "aes"}, {"prompt": "aes 1", "teacher_id": "aes"}]
    assert list(both) == [*aes, {"prompt": "ocr 0", "teacher_id": "ocr"}]
    assert list(single) == aes


def test_a_stream_is_evaluated_as_its_rows(tmp_path):
    rows = {task: list(prompts_of(task, count)) for task, count in (("aes", 3), ("ocr", 2))}
    forms = [
        {task: Dataset.from_list(rows[task]) for task in rows},
        {task: stream(task, len(rows[task])) for task in rows},
    ]
    results = []
    for data in forms:
        trainer = DiffusionOPDTrainer(
            BUILDERS["sd3"](0),
            {"aes": BUILDERS["sd3"](1), "ocr": BUILDERS["sd3"](2)},
            DiffusionOPDConfig(
                str(tmp_path),
                use_cpu=True,
                per_device_eval_batch_size=2,
                num_inference_steps=2,
                call_kwargs=CALL["sd3"],
                report_to="none",
                disable_tqdm=True,
            ),
            eval_dataset=data,
        )
        results.append(trainer.evaluate())
    for name in ("eval_loss", "eval_kl/aes", "eval_kl/ocr"):
        assert results[0][name] == results[1][name] > 0


def column(prompts: list, ids: list | None = None) -> Dataset:
    return Dataset.from_dict({"prompt": prompts} | ({"teacher_id": ids} if ids else {}))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Dataset.from_dict({"text": ["a"]}), ["train_dataset has no column ['prompt', 'teacher_id']", "['text']"]),
        (column(["a"]), ["no column ['teacher_id']", "which one judges a prompt"]),
        (column(["a", ""], ["aes", "ocr"]), ["row 1", "not empty", "''"]),
        (column(["a", " \n"], ["aes", "ocr"]), ["row 1", "not empty"]),
        (column([None, "b"], ["aes", "ocr"]), ["row 0", "None"]),
        (column([1, 2], ["aes", "ocr"]), ["row 0", "must be text"]),
        (column([[{"role": "user", "content": "a"}]] * 2, ["aes", "ocr"]), ["row 0", "must be text", "role"]),
        (column(["a", "b", "c"], ["aes", "ocr", "x"]), ["['aes', 'ocr', 'x']", "the teachers are ['aes', 'ocr']"]),
        (column(["a", "b"], ["aes", None]), ["the `teacher_id` column of train_dataset has rows without a value"]),
        (column(["a", "b"], ["aes", "aes"]), ["the data has ['aes']", "['aes', 'ocr']"]),
        (column([], []), ["train_dataset"]),
        ({"aes": column(["a"])}, ["keys of train_dataset", "['aes']", "['aes', 'ocr']"]),
        (DatasetDict(train=column(["a"])), ["train_dataset is a DatasetDict", "['train']", "split='train'"]),
        ({"aes": column(["a"]), "ocr": column(["b"]), "x": column(["c"])}, ["['aes', 'ocr', 'x']"]),
        ({"aes": column(["a"]), "ocr": Dataset.from_dict({"p": ["b"]})}, ["train_dataset['ocr']", "['prompt']"]),
        ({"aes": column(["a"]), "ocr": column([""])}, ["train_dataset['ocr']", "row 0"]),
        ({"aes": column(["a"]), "ocr": column([])}, ["train_dataset['ocr'] is empty"]),
        ({"aes": stream("aes", 1), "ocr": IterableDataset.from_generator(lambda: iter([{"p": 1}]))}, ["['ocr']"]),
        (stream("aes", 1), ["no column ['teacher_id']"]),
    ],
)
def test_refused_data_is_named(data, words: list[str]):
    with pytest.raises(ValueError) as refusal:
        routed_dataset(data, ["aes", "ocr"], "train_dataset")
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (["a", "b"], ["train_dataset must be", "list"]),
        ("prompts.txt", ["train_dataset must be", "str"]),
        ({"aes": column(["a"]), "ocr": stream("ocr", 1)}, ["all be", "'aes': 'Dataset'", "'ocr': 'IterableDataset'"]),
        ({"aes": ["a"], "ocr": ["b"]}, ["'aes': 'list'"]),
    ],
)
def test_data_of_another_type_is_named(data, words: list[str]):
    with pytest.raises(TypeError) as refusal:
        routed_dataset(data, ["aes", "ocr"], "train_dataset")
    assert all(word in str(refusal.value) for word in words), refusal.value
