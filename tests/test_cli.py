import ast
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError

from src import parsing
from src.arguments import evaluation_options, name_in_help, resolve_names, with_default_config
from src.cli import COMMANDS, INTERRUPTED, LESS_MEMORY, main
from src.errors import InputError
from src.parsing import run_function
from tests.commands import clean_environment

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ["--trainer", "cpu.yaml", "--trainer.enable_progress_bar", "false"]


def fails(arguments, capsys):
    """Run a command that must stop; returns its one error line."""
    code = main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    return lines[0]


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert f"{name}" in text
        assert summary in text


def test_standard_output_that_knows_no_utf8_or_is_closed_takes_the_help(monkeypatch):
    monkeypatch.setattr("src.cli.usage", lambda: "α")
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert main(["--help"]) == 0
    assert ascii_only.buffer.getvalue() == rb"\u03b1"
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["--help"]) == 0
    assert main(["fitt"]) == 2


@pytest.mark.parametrize("buffering", [1, -1])
def test_a_reader_that_has_gone_is_no_error(monkeypatch, capsys, buffering):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=buffering) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["--help"]) == 0
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
@pytest.mark.parametrize("buffering", [1, -1])
def test_full_standard_output_is_named(monkeypatch, capsys, buffering):
    with open("/dev/full", "w", buffering=buffering) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["--help"]) == 2
        monkeypatch.undo()
    assert capsys.readouterr().err == "error: standard output: No space left on device\n"


def test_an_argument_that_is_no_utf8_is_one_line(capsys):
    line = fails(["merge", "--output", "caf\udce9"], capsys)
    assert line.startswith(r"error: 'caf\udce9': a name with bytes that are no UTF-8; rename it")


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_of_a_command_explains_its_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m src {command}" in text
    assert "default:" in text
    if "--trainer." in text:
        ours = [text.index(option) for option in ("--output", "--model.base", "--data.batch_size")]
        assert max(ours) < text.index("--trainer.")


def command_of(path):
    """The command that a config under ``configs/`` is for."""
    if "study" in yaml.safe_load(path.read_text(encoding="utf-8")):
        return "experiment"
    stem = next((c for c in ("fisher", "merge", "test") if path.stem.startswith(f"{c}_")), path.stem)
    return {"expert": "fit", "safety": "fit", "task_arithmetic": "merge"}.get(stem, stem)


def configs_and_hardware():
    """One config of each command with a Trainer beside every hardware file, the others, and studies, beside one."""
    files = sorted(p.name for p in ROOT.glob("trainers/*.yaml"))
    hardware = {"merge": [None], "judge": [None], "report": [None]}
    whole = {"expert.yaml", "fisher.yaml", "test.yaml"}
    for path in sorted(ROOT.glob("configs/*.yaml")):
        for name in hardware.get(command_of(path), files if path.name in whole else files[:1]):
            yield pytest.param(path, name, id=f"{name}-configs/{path.name}")


@pytest.mark.parametrize(("path", "hardware"), list(configs_and_hardware()))
def test_configs_parse_with_hardware_files(path, hardware, capsys):
    trainer = [] if hardware is None else ["--trainer", hardware]
    with pytest.raises(SystemExit) as stop:
        main([command_of(path), "--config", str(path.relative_to(ROOT)), *trainer, "--print_config"])
    assert stop.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(path.read_text())
    assert set(given) <= set(resolved)


def test_hardware_files_hold_hardware_only():
    for path in ROOT.glob("trainers/*.yaml"):
        allowed = {"accelerator", "devices", "strategy", "precision", "num_nodes"}
        assert set(yaml.safe_load(path.read_text())) <= allowed, path


def test_processes_of_the_simulation_are_sharded_as_gpus_are_whatever_their_number():
    one, two = (yaml.safe_load((ROOT / "trainers" / name).read_text()) for name in ("fsdp.yaml", "fsdp_sim.yaml"))
    assert one["strategy"] == two["strategy"]
    assert "init_args" not in one["strategy"]


def test_names_are_found_as_given_then_in_their_folder(tmp_path, monkeypatch):
    assert resolve_names(["--config", "expert.yaml", "--trainer=ddp.yaml"]) == [
        "--config",
        "configs/expert.yaml",
        "--trainer=trainers/ddp.yaml",
    ]
    (tmp_path / "expert.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_names(["--config", "expert.yaml"]) == ["--config", "expert.yaml"]
    with pytest.raises(InputError, match=r"--config nowhere.yaml: no such file here or under configs/"):
        resolve_names(["--config", "nowhere.yaml"])


def test_the_demos_merge_does_not_get_into_one_of_other_adapters(adapters, tmp_path):
    assert with_default_config("merge", ["--alpha", "1"]) == ["--config", "merge.yaml", "--alpha", "1"]
    assert with_default_config("merge", ["--utility=a"]) == ["--utility=a"]
    for flag in ("--utility+=a", "--safety=a"):
        assert with_default_config("merge", [flag]) == [flag]
    assert with_default_config("test", ["--utility=a"])[:2] == ["--config", "test.yaml"]
    both = f"[{adapters['utility']}, {adapters['safety']}]"
    given = ["merge", "--combine", "Ties", "--utility", both, "--rank", "32"]
    assert main([*given, "--output", str(tmp_path / "m")]) == 0


def test_the_demos_report_is_not_replaced_by_that_of_other_results():
    assert with_default_config("report", []) == ["--config", "report.yaml"]
    assert with_default_config("report", ["--overwrite", "true"])[:2] == ["--config", "report.yaml"]
    for given in (["out/choose"], ["--results", "out/choose"], ["--results=out/choose"], ["--config", "report.yaml"]):
        assert with_default_config("report", given) == given
    with pytest.raises(InputError, match="report a b: 2 folders; expected one"):
        with_default_config("report", ["a", "b", "--overwrite"])


def test_a_study_is_computed_only_where_one_is_named(capsys):
    """It takes hours, so none is a default."""
    assert "experiment: no study; expected --config" in fails(["experiment", "--dry_run", "true"], capsys)
    for given in (["--config", "a.yaml"], ["--study", "Comparison"], ["--help"]):
        assert with_default_config("experiment", given) == given


def test_a_training_tells_its_size_to_the_last_parameter(base, rows, tmp_path, capsys):
    assert main(fit_arguments(base, rows, tmp_path / "out", "--model.optimizer.lr", "-1")) == 2
    assert re.search(r"training \d[\d,]+ of \d+,[\d,]+ parameters", capsys.readouterr().err)


def test_an_interrupt_names_every_command_that_goes_on():
    before, _, others = INTERRUPTED.partition(" or starts again")
    assert others == " (the others)"
    assert all(name in before for name in ("fisher", "test", "predict", "experiment", "fit --resume true", "judge"))


def test_a_gpu_without_room_is_one_line_and_other_errors_stay(monkeypatch, capsys):
    def runs(error, command="fit"):
        def raises(_):
            raise error

        monkeypatch.setattr("src.cli.runner", lambda _: raises)
        return main([command])

    full = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")
    said = "CUDA out of memory. Tried to allocate 2.00 GiB."
    for command, less in LESS_MEMORY.items():
        assert runs(full, command) == 2
        assert capsys.readouterr().err == f"error: {said}; {less}\n"
    assert runs(full, "merge") == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    with pytest.raises(RuntimeError, match="a mistake"):
        runs(RuntimeError("a mistake"))
    # One process alone has no room; the first one knows nothing of it.
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runs(full) == 2
    assert capsys.readouterr().err == f"error in process 1: {said}; {LESS_MEMORY['fit']}\n"
    assert runs(InputError("told by the first process")) == 2
    assert capsys.readouterr().err == ""


def test_the_options_that_make_room_are_there(capsys):
    for command, less in LESS_MEMORY.items():
        shown = ""
        for more in (
            ["--help"],
            *([["--judge.help", "Causal"], ["--judge.help", "Classifier"]] * (command == "judge")),
        ):
            with pytest.raises(SystemExit):
                main([command, *more])
            shown += capsys.readouterr().out
        options = re.findall(r"--[\w.]+", less)
        assert options
        assert all(option in shown for option in options), command


def test_unknown_commands_and_keys_are_one_line(tmp_path, capsys):
    assert "unknown command 'fitt'" in fails(["fitt"], capsys)
    assert "colour" in fails(["merge", "--colour", "red"], capsys)
    config = tmp_path / "c.yaml"
    config.write_text("output: x\nmodel:\n  bace:\n    name: x\ndata:\n  train: a.jsonl\n  val: b.jsonl\n")
    assert "bace" in fails(["fit", "--config", str(config)], capsys)
    config.write_text("data:\n  train: a.jsonl\n  val:\n    - {path: b.jsonl, sead: 1}\n")
    line = fails(["fit", "--config", str(config)], capsys)
    assert line.startswith(
        f"error: {config}: Parser key \"data.val[0]\": Option 'sead' is not accepted; expected one of path, split"
    )
    line = fails(["merge", "--method", "Sst", "--method.gamma", "1"], capsys)
    assert "Parser key \"method\": Option 'gamma' is not accepted; expected one of filter, t, k," in line
    config.write_text("a: [")
    line = fails(["fit", "--config", str(config)], capsys)
    assert line.startswith(f"error: {config}: not valid YAML: while parsing a flow node")
    assert "in line " in line
    assert "unicode string" not in line
    # A key that no option has, in the second of three files.
    config.write_text("modle: {lora: 3}\n")
    line = fails(["fit", "--config", "expert.yaml", "--config", str(config), "--config", "safety.yaml"], capsys)
    assert line.startswith(f"error: {config}: Option 'modle' is not accepted; expected one of seed_everything")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["fit", "--model.lora.rank", "high"], "model.lora.rank\": 'high'; expected a whole number"),
        (["fit", "--model.optimizer.lr", "fast"], "model.optimizer.lr\": 'fast'; expected a number"),
        (["fit", "--trainer.max_epochs", "two"], "trainer.max_epochs\": 'two'; expected a whole number or null"),
        (["test", "--overwrite", "maybe"], "overwrite\": 'maybe'; expected true or false"),
        (["merge", "--alpha", "x"], "alpha\": 'x'; expected a list or a number"),
        (["merge", "--method", "Sst", "--method.t", "big"], "method.t\": 'big'; expected a number"),
        (
            ["merge", "--method", "Sst", "--method.filter", "sof"],
            "method.filter\": 'sof'; expected one of soft, topk, energy, threshold",
        ),
    ],
)
def test_a_value_of_another_type_is_told_what_is_expected(capsys, given, message):
    assert fails(given, capsys) == f'error: Parser key "{message}'


def test_a_value_in_a_file_is_told_with_the_file(tmp_path, capsys):
    suite = {"name": "a", "kind": "harmfull", "rows": "x.jsonl"}
    (tmp_path / "c.yaml").write_text(json.dumps({"data": {"suites": [suite]}}))
    line = fails(["test", "--config", str(tmp_path / "c.yaml")], capsys)
    told = "Parser key \"data.suites[0] (a).kind\": 'harmfull'; expected one of harmful, jailbreak, borderline"
    assert line.startswith(f"error: {tmp_path / 'c.yaml'}: {told}")


def test_a_name_like_that_of_a_configuration_is_told_that(tmp_path, capsys):
    assert fails(["fit", "--config", "exprt.yaml"], capsys).endswith("under configs/; did you mean expert.yaml?")
    assert fails(["fit", "--trainer", "dpp.yaml"], capsys).endswith("under trainers/; did you mean ddp.yaml?")
    for name in ("zzzzzz", "nowhere.yaml"):  # .yaml alone is no likeness
        assert fails(["fit", "--config", name], capsys).endswith("under configs/")


@dataclass
class Part:
    """A part with a name."""

    name: str
    sizes: list[int] = field(default_factory=list)


@dataclass
class Whole:
    """What parts make."""

    parts: list[Part] = field(default_factory=list)
    other: int = 1


def asked(*, flat: Whole, whole: Whole | None = None, only: list[str] | None = None, steps: list[str] | None = None):
    """Options of each form."""


NAMES = "; expected one of "


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("flatt: {parts: {sizes: [1]}}", f"Option 'flatt' is not accepted{NAMES}flat, whole, only, steps"),
        ("flat: {othr: {sizes: 1}}", f"Option 'flat.othr' is not accepted{NAMES}parts, other"),
        ("flat: {parts: [{name: a}, {nme: b}]}", f"\"flat.parts[1]\": Option 'nme' is not accepted{NAMES}name, sizes"),
        (
            "whole: {parts: [{name: a}, {name: half, sizs: b}]}",
            f"\"whole.parts[1] (half)\": Option 'sizs' is not accepted{NAMES}name, sizes",
        ),
        (
            "flat: {parts: [{name: a}, {name: [b]}]}",
            "\"flat.parts[1] (['b']).name\": ['b']; expected a text",
        ),
        ("whole: {parts: [{name: a, sizes: b}]}", "\"whole.parts[0] (a).sizes\": 'b' is no list; expected '[b]'"),
        ("only: half", "Parser key \"only\": 'half' is no list; expected '[half]'"),
        ("steps: out/utility", "Parser key \"steps\": 'out/utility' is no list; expected '[out/utility]'"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_path_to_it(tmp_path, given, message):
    (tmp_path / "c.yaml").write_text(given)
    with pytest.raises(InputError) as error:
        run_function(asked, "asked", "Options.", ["--config", str(tmp_path / "c.yaml")])
    told = str(error.value).removeprefix(f"{tmp_path / 'c.yaml'}: ")
    assert told != str(error.value)
    assert told.removeprefix("Parser key ") == message.removeprefix("Parser key ")


def test_one_word_for_a_list_is_told_the_form_of_a_list(capsys):
    assert fails(["merge", "--sweep.t", "3"], capsys) == "error: Parser key \"sweep\": '3' is no list; expected '[3]'"
    assert "\"adapters\": 'a b' is no list; expected '[a b]'" in fails(["inspect", "--adapters", "a b"], capsys)


def base_flags(base):
    return ["--model.base.name", str(base), "--model.base.dtype", "float64", *TRAINER]


def fit_arguments(base, rows, output, *more):
    data = ["--data.train", str(rows["task"]), "--data.val", str(rows["val"])]
    return ["fit", "--config", "expert.yaml", *base_flags(base), *data, "--output", str(output), *more]


def test_bad_rows_stop_before_anything_is_written(base, rows, tmp_path, capsys):
    broken = tmp_path / "rows.jsonl"
    broken.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n')
    given = fit_arguments(base, {"task": broken, "val": rows["val"]}, tmp_path / "out")
    assert f"{broken}:2: the row has no answer" in fails(given, capsys)
    given = fit_arguments(base, {"task": tmp_path / "no.jsonl", "val": rows["val"]}, tmp_path / "out")
    assert "no.jsonl: no such file" in fails(given, capsys)
    assert not (tmp_path / "out").exists()


def test_rows_of_every_form_are_named_by_a_flag(base, rows, tmp_path, capsys):
    """A file of another form than JSONL is read as rows, and not as the value of the flag."""
    data = tmp_path / "rows.csv"
    data.write_text("question,response\na,b\n")
    given = fit_arguments(base, {"task": data, "val": rows["val"]}, tmp_path / "out")
    assert f"{data}[train] row 0: no column 'prompt'" in fails(given, capsys)
    text = f'[{{"path": "{data}", "colour": "red"}}]'
    assert "unknown key 'colour'" in fails(fit_arguments(base, {"task": text, "val": rows["val"]}, "x"), capsys)
    assert "a directory" in fails(fit_arguments(base, {"task": _folder(tmp_path), "val": rows["val"]}, "x"), capsys)


def _folder(tmp_path):
    (tmp_path / "d.jsonl").mkdir()
    return tmp_path / "d.jsonl"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_hardware_that_is_not_here_is_one_line(base, rows, tmp_path, capsys):
    given = [*fit_arguments(base, rows, tmp_path / "out"), "--trainer", "gpu.yaml"]
    assert "trainer: `CUDAAccelerator` can not run on your system" in fails(given, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.lora.rank", "0"], "rank 0"),
        (["--model.warmup", "1.5"], "model.warmup is 1.5"),
        (["--model.lora.targets", "nonsense"], "lora.targets ['nonsense']"),
        (["--data.batch_size", "0"], "data.batch_size is 0"),
        (["--data.window", "0"], "data.window is 0; expected at least 1 batch"),
        (["--model.optimizer.lr", "-1"], "model.optimizer: Invalid learning rate"),
        (["--trainer.max_epochs", "0"], "trainer.max_epochs is 0; expected at least 1"),
        (["--trainer.max_steps", "-2"], "trainer.max_steps is -2"),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches is 0; expected at least 1"),
        (["--trainer.check_val_every_n_epoch", "0"], "trainer.check_val_every_n_epoch is 0; expected at least 1"),
        (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches is 0; expected something to train on"),
        (["--trainer.overfit_batches", "2"], "trainer.overfit_batches: batches hold rows of like length"),
        (["--trainer.val_check_interval", "500"], "trainer.val_check_interval"),
        (["--trainer.devices", "abc"], "trainer: "),
        (["--trainer.strategy", "nope"], "trainer: "),
        (["--model.lora.targets", "*_proj"], "lora.targets *_proj"),
        (["--model.lora.alpha", ".nan"], "alpha nan"),
        # Not -1, which is read as -1.0 where Python's typing has met Optional[Union[float, int]] before.
        (["--trainer.gradient_clip_val", "-1.5"], "trainer.gradient_clip_val is -1.5; expected 0 (off) or more"),
    ],
)
def test_fit_settings_out_of_range_are_one_line(base, rows, tmp_path, capsys, flags, message):
    assert message in fails(fit_arguments(base, rows, tmp_path / "out", *flags), capsys)


def test_merge_errors_are_one_line(adapters, tmp_path, capsys):
    given = ["merge", "--utility", str(adapters["utility"]), "--safety", str(adapters["safety"])]
    ta = [*given, "--method", "TaskArithmetic", "--output", str(tmp_path / "m")]
    assert "alpha is -1.0" in fails([*ta, "--alpha", "-1"], capsys)
    assert "no such directory" in fails([*ta, "--safety", str(tmp_path / "x")], capsys)
    assert "method.rho is 0.0" in fails([*given, "--output", "x", "--method", "Sst", "--method.rho", "0"], capsys)
    assert "Nonsense" in fails([*given, "--output", "x", "--method", "Nonsense"], capsys)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "file").touch()
    assert "exists already" in fails([*ta, "--alpha", "1"], capsys)
    assert (tmp_path / "m" / "file").exists()


def interrupted(*_, **__):
    raise KeyboardInterrupt


def terminated(*_, **__):
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    raise SIGTERMException


def full_disk(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "failure", "message"),
    [
        ("src.merge.stage.combined", interrupted, "interrupted"),
        ("src.merge.stage.combined", terminated, "interrupted"),
        ("src.adapters.peft_files.save_file", full_disk, "No space left on device"),
    ],
)
def test_an_interrupt_or_a_full_disk_is_one_line(adapters, tmp_path, capsys, monkeypatch, place, failure, message):
    monkeypatch.setattr(place, failure)
    given = ["--utility", str(adapters["utility"]), "--safety", str(adapters["safety"])]
    assert message in fails(["merge", "--method", "TaskArithmetic", *given, "--output", str(tmp_path / "m")], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--adapters a b --output o", ['--model.adapters=["a", "b"]', "--output", "o"]),
        ("--adapters a", ["--model.adapters=a"]),
        (
            "--model.adapters=[a,b] --allow_code_execution",
            ["--model.adapters=[a,b]", "--model.allow_code_execution=true"],
        ),
        ("--allow_code_execution false --adapters", ["--model.allow_code_execution=false", "--model.adapters"]),
    ],
)
def test_adapters_may_be_listed_behind_their_option(given, expected):
    assert evaluation_options(given.split()) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--method=Ties --method.help", "--method.help Ties"),
        ("--method.help --combine Dare --method Ties", "--method.help Ties"),
        ("--method.help Ties --method Dare", None),
        ("--method.help --config merge.yaml", None),
        ("--method Ties --alpha -1", None),
    ],
)
def test_the_name_of_what_help_is_asked_for_may_stand_before(given, expected):
    assert name_in_help(given.split()) == (expected or given).split()


RANK = {
    "cli": 4,
    "functions": 4,
    "training": 4,
    "trainer_checks": 4,
    "trainer_command": 4,
    "trainer_parser": 4,
    "parsing": 4,
    "experiments": 3,
    "report": 3,
    "models": 2,
    "merge": 2,
}
LOW = {"adapters", "fisher", "gevp", "metrics", "data", "judges", "sandbox"}
PURE = {"fisher", "gevp", "metrics", "sandbox"}


def imports():
    for path in sorted((ROOT / "src").rglob("*.py")):
        room = path.relative_to(ROOT / "src").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                yield path, room, node.module
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    yield path, room, alias.name


def test_rooms_import_downwards_only():
    rank = RANK | dict.fromkeys(LOW, 1)
    for path, room, module in imports():
        parts = module.split(".")
        if parts[0] == "src" and len(parts) > 1 and room in rank and parts[1] in rank:
            assert rank[parts[1]] <= rank[room], f"{path} imports {module}"
        if room == "merge":
            assert parts[0] != "lightning", f"{path} imports {module}"
        if room == "models":  # beside merge: what both need lies below them
            assert parts[:2] != ["src", "merge"], f"{path} imports {module}"


def test_commands_without_a_trainer_start_without_lightning():
    """In an interpreter of its own, as this one has imported everything."""
    code = """if True:
        import sys
        from src import functions
        for command in (functions.merge, functions.inspect, functions.report):
            try:
                command(["--help"])
            except SystemExit as stop:
                assert stop.code == 0
        assert not {"lightning", "torchmetrics", "peft"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_environment(), capture_output=True, check=True)


def test_mathematical_rooms_know_no_framework():
    for path, room, module in imports():
        if room in PURE:
            assert module.split(".")[0] not in ("lightning", "transformers", "peft"), f"{path} imports {module}"


def test_only_one_room_knows_pefts_key_names():
    for path in (ROOT / "src").rglob("*.py"):
        if "adapters" not in path.parts:
            assert "base_model.model" not in path.read_text(), path
            assert "lora_A.weight" not in path.read_text(), path


def test_a_class_that_cannot_be_made_is_one_line():
    text = (
        "Does not validate against any of the Union subtypes\nErrors:\n  - Problem with given class_path 'x.Logger':\n"
        "      Requirement 'x>=1' not met.\n      HINT: pip install x\n  - Expected a <class 'bool'>\n"
    )
    found = parsing._of_the_user(ValueError(text))
    assert isinstance(found, InputError)
    assert str(found) == "x.Logger: Requirement 'x>=1' not met. HINT: pip install x"
    other = ValueError("something else")
    assert parsing._of_the_user(other) is other


def test_a_tilde_in_a_list_or_a_file_is_the_users_home(adapters, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("utility", "safety"):
        (tmp_path / name).symlink_to(adapters[name])
    given = ["--utility", '["~/utility"]', "--safety", "~/safety", "--method", "TaskArithmetic", "--output", "~/merged"]
    assert main(["merge", *given]) == 0
    assert (tmp_path / "merged" / "adapter_config.json").is_file()
