"""The exported repository as files, the names of requests, and the errors without a server; nothing is started."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner
from conftest import Refused, assert_one_line, snapshot
from stand_ins.checkpoints import TINY_CHAT
from stand_ins.triton_backend import module

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.cli import main
from nemodiff.engine_folder import TRITON_FILE
from nemodiff.errors import EngineError, RequestError, ServerError
from nemodiff.runtime.requests.options import OPTIONS
from nemodiff.serving.triton_server import executable
from nemodiff.serving.triton_server import server as triton_server
from nemodiff.serving.triton_server.export import export
from nemodiff.serving.triton_server.model import TritonPythonModel
from nemodiff.serving.triton_server.outputs import OUTPUTS
from nemodiff.serving.triton_server.parameters import INPUTS, model_parameters, read

EXAMPLE = Path(__file__).parents[2] / "examples" / "triton"
STAND_IN = Path(__file__).parents[1] / "stand_ins" / "triton_backend.py"


def test_export_copies_the_engine_and_replaces_only_its_own_kind(
    tiny_engine: Path, tmp_path: Path, refused: Refused
) -> None:
    folder = export(tiny_engine, tmp_path / "models", parameters={"rows": "4", "mode": "ar"})
    assert {path.name for path in folder.iterdir()} == {"config.pbtxt", "1", TRITON_FILE}
    assert snapshot(folder / "1" / "engine").keys() != set()
    assert (folder / "1" / "engine" / "manifest.json").read_bytes() == (tiny_engine / "manifest.json").read_bytes()
    text = "".join(
        path.read_text() for path in (folder / "config.pbtxt", folder / "1" / "model.py", folder / TRITON_FILE)
    )
    assert not re.search(rf"{re.escape(str(tmp_path))}|{re.escape(str(tiny_engine))}|KIND_(CPU|GPU)", text)
    export(tiny_engine, tmp_path / "models", link=True)
    assert (folder / "1" / "engine").resolve() == tiny_engine.resolve()
    assert "rows" not in (folder / "config.pbtxt").read_text()
    (folder / "2").mkdir()
    command = ["triton", "export", str(tiny_engine), "--repo", str(tmp_path / "models")]
    refused(command, "would remove '2'")
    (tmp_path / "models" / "other").mkdir()
    (tmp_path / "models" / "other" / "config.pbtxt").touch()
    refused([*command, "--name", "other"], "exists and is not an exported Triton model", "another --repo or --name")


def test_the_folder_works_wherever_it_is_put(tiny_engine: Path, tmp_path: Path) -> None:
    made = tmp_path / "engine-of-this-machine"
    shutil.copytree(tiny_engine, made)
    folder = export(made, tmp_path / "models")
    expected = nemodiff.generate(nemodiff.load(made, threads=1), "Count from 3 to 9.", max_new_tokens=40).text
    shutil.rmtree(made)
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    marks = [str(tmp_path), str(Path.home()) + "/", str(EXAMPLE.parents[1]), sys.prefix, socket.gethostname()]
    for file in (path for path in moved.rglob("*") if path.is_file()):
        leaked = [mark for mark in marks if mark.encode() in file.read_bytes()]
        assert leaked == [], file
        assert not file.is_symlink()
    answered = subprocess.run(
        [sys.executable, "-W", "error", str(STAND_IN), str(moved)], capture_output=True, text=True, cwd=tmp_path
    )
    assert (answered.stderr, answered.stdout) == ("", expected + "\n")


SMALL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from nemodiff.cli import main
main(["triton", "export", sys.argv[1], "--repo", sys.argv[2]])
"""


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_fills_up_is_one_short_line(tiny_engine: Path, tmp_path: Path, there: bool) -> None:
    """Nothing stays, and of the folders that lead to the export those that were there."""
    (tmp_path / "all").mkdir()
    models = tmp_path / "all" / "my" / "models"
    if there:
        models.parent.mkdir()
    command = [sys.executable, "-W", "error", "-c", SMALL_DISK, str(tiny_engine), str(models)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    folder = models / "nemodiff"
    assert_one_line(
        ended.stderr, f"{folder}: writing failed (File too large); free some space or choose another --repo"
    )
    assert len(ended.stderr) < 250 + len(str(folder))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert list((tmp_path / "all").rglob("*")) == ([models.parent] if there else [])


def test_a_full_disk_is_refused_before_a_byte_is_written(
    tiny_engine: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    command = ["triton", "export", str(tiny_engine), "--repo", str(tmp_path / "models")]
    refused(command, "nemodiff: the export needs ", "of disk, 1000 B are free", "choose another --repo or add --link")
    assert export(tiny_engine, tmp_path / "models", link=True).is_dir()


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--set", "rows"], "--set is 'rows', allowed: NAME=VALUE"),
        (["--set", "rows=99"], "rows is 99, allowed: 1 to 8"),
        (["--set", "rows=many"], "rows is 'many', allowed: an integer"),
        (["--set", "waiting=0"], "waiting is 0, allowed: 1 or more"),
        (["--set", "max_logprobs=-1"], "max_logprobs is -1, allowed: 0 or more"),
        (["--set", "threads=2000"], "threads is 2000, allowed: 1 to 1024"),
        (["--set", "gpu_memory_utilization=2"], "gpu_memory_utilization is 2.0, allowed: over 0 to 1"),
        (["--set", "stream_interval_ms=-1"], "stream_interval_ms is -1.0, allowed: 0 or more"),
        (["--set", "stream_interval_ms=nan"], "stream_interval_ms is nan, allowed: 0 or more"),
        (["--set", "device=0"], "device is '0', allowed on onnxruntime: cpu"),
        (["--set", "max_tokenz=3"], "unknown parameter 'max_tokenz'; allowed: "),
        (["--set", "mode=bogus"], "mode is 'bogus', allowed: ar"),
        (["--set", "temperature=-1"], "temperature is -1.0, allowed: 0 or 1e-30 and more"),
        (["--set", "stream=perhaps"], "stream is 'perhaps', allowed: true or false"),
        (["--name", "a/b"], "--name is 'a/b', allowed: letters"),
    ],
)
def test_wrong_exports_are_refused(
    tiny_engine: Path, tmp_path: Path, refused: Refused, arguments: list[str], fragment: str
) -> None:
    refused(["triton", "export", str(tiny_engine), "--repo", str(tmp_path / "models"), *arguments], fragment)


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("waiting", 0), ("prefill_tokens", 0), ("max_logprobs", -1)])
def test_a_limit_is_refused_as_by_the_scheduler(
    engine: nemodiff.LoadedEngine, tmp_path: Path, name: str, value: int
) -> None:
    limits: dict[str, Any] = {name: value}
    with pytest.raises(RequestError) as of_scheduler:
        nemodiff.Scheduler(engine, **limits)
    with pytest.raises(RequestError) as of_export:
        export(engine.folder, tmp_path / "models", parameters={name: str(value)})
    assert str(of_export.value) == f"--set: {of_scheduler.value}"


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_repository_where_a_file_stands_is_refused(
    tiny_engine: Path, tmp_path: Path, refused: Refused, below: str
) -> None:
    (tmp_path / "file").write_text("kept")
    line = f"lies in {tmp_path / 'file'}, which is not a folder; choose another --repo"
    refused(["triton", "export", str(tiny_engine), "--repo", str(tmp_path / "file" / below)], line)
    assert (tmp_path / "file").read_text() == "kept"


def test_something_that_is_no_engine_is_refused(tmp_path: Path, refused: Refused) -> None:
    refused(["triton", "export", str(tmp_path), "--repo", str(tmp_path / "models")], "nemodiff build")


def test_the_configuration_declares_the_table(tiny_engine: Path, tmp_path: Path) -> None:
    for batched in (False, True):
        value = 'a "quoted" \\ line\nend ü'
        folder = export(tiny_engine, tmp_path / "models", batched=batched, parameters={"system": value})
        text = (folder / "config.pbtxt").read_text(encoding="utf-8")
        declared = re.findall(r'name: "(\w+)" data_type: TYPE_(\w+) dims: \[ (-?1) \]( optional: true)?', text)
        expected = [(i.name, i.type, "-1" if i.many else "1", " optional: true") for i in INPUTS]
        expected[0] = ("text_input", "STRING", "1", "")
        assert declared == [*expected, *((o.name, o.type, "-1" if o.many else "1", "") for o in OUTPUTS)]
        assert f"max_batch_size: {int(batched)}\n" in text
        assert r'value: { string_value: "a \"quoted\" \\ line\nend ü" }' in text


def test_every_option_has_a_name_and_every_input_an_option() -> None:
    assert {i.option for i in INPUTS if i.option is not None} <= OPTIONS.keys()
    for option in OPTIONS.values():
        spelled: Any = {int: 3, float: 0.5, bool: True}.get(option.type, "x")
        if option.name in ("logit_bias", "json_schema", "stop_token_ids"):
            spelled = {"logit_bias": {"5": 1}, "json_schema": {"type": "object"}, "stop_token_ids": [5]}[option.name]
        request = read({"text_input": ["x"], "sampling_parameters": [json.dumps({option.name: spelled})]}, {}, {})
        assert list(request.options)[:1] == [option.name]


def test_what_is_nearer_to_the_request_wins() -> None:
    tensors = {"text_input": ["x"], "top_k": [4], "sampling_parameters": ['{"top_k": 3, "top_p": "0.3"}']}
    parameters = {"top_k": 2, "top_p": 0.2, "seed": "2", "timeout": 5, "triton_x": 1, "x-request-id": "a"}
    defaults = model_parameters({"top_k": "1", "top_p": "0.1", "seed": "1", "temperature": "0.5", "rows": "4"})
    assert defaults.rows == 4
    request = read(tensors, parameters, defaults.values)
    assert request.options == {"top_k": 4, "top_p": 0.3, "seed": 2, "temperature": 0.5}
    assert not request.stream
    assert not request.echo


@pytest.mark.parametrize("minus_one", [-1, "-1"])
def test_minus_one_leaves_a_limit_and_a_seed_to_the_model(minus_one: object) -> None:
    sampling = json.dumps({"max_tokens": minus_one, "random_seed": minus_one})
    defaults = model_parameters({"max_tokens": "20", "seed": "3"})
    request = read({"text_input": ["x"], "sampling_parameters": [sampling]}, {}, defaults.values)
    assert request.options == {"max_new_tokens": 20, "seed": 3}
    tensors = {"text_input": ["x"], "max_tokens": [-1]}
    assert read(tensors, {"seed": "-1"}, {}).options == {}


def test_sampling_without_a_seed_draws_one() -> None:
    warm = {"text_input": ["x"], "temperature": [0.7]}
    assert len({read(warm, {}, {}).options["seed"] for _ in range(5)}) > 1
    assert read({**warm, "seed": [3]}, {}, {}).options["seed"] == 3
    assert read(warm, {}, {"seed": "4"}).options["seed"] == 4
    assert "seed" not in read({"text_input": ["x"]}, {}, {}).options


@pytest.mark.parametrize(
    ("sampling", "fragment"),
    [
        ({"ignore_eos": True}, "ignore_eos needs a limit; give max_tokens"),
        ({"n": 2}, "n is 2, allowed: 1"),
        ({"best_of": "2"}, "best_of is 2, allowed: as many as n, the answers; leave it out"),
        ({"use_beam_search": True}, "use_beam_search is True, allowed: False"),
        ({"max_tokens": 5, "max_new_tokens": 6}, "max_tokens is 5 and max_new_tokens is 6; give one of them"),
        ({"guided_decoding_guide_type": "xml", "guided_decoding_guide": "<a/>"}, "json_schema, regex, ebnf_grammar"),
        ({"guided_decoding_guide_type": {}, "guided_decoding_guide": "a"}, "guided_decoding_guide_type is {}"),
        ({"guided_decoding_guide_type": ["json"]}, "guided_decoding_guide_type is ['json'] with no guide"),
        ({"guided_decoding_guide_type": "regex"}, "guided_decoding_guide_type is 'regex' with no guide"),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs has 'structural_tag', allowed: json, json_object, regex, choice, grammar",
        ),
        ({"structured_outputs": "{"}, "structured_outputs: not JSON"),
        (
            {"guided_decoding": {"regex": "a"}, "guided_regex": "b"},
            "guided_decoding.regex is 'a' and guided_regex is 'b'",
        ),
        (
            {"structured_outputs": {"choice": []}},
            "structured_outputs.choice is [], allowed: a list of one text or more",
        ),
        ({"guided_choice": ["a", 5]}, "guided_choice is ['a', 5], allowed: a list of one text or more"),
        ({"guided_choice": "yes"}, "guided_choice is 'yes', allowed: a list of one text or more"),
        (
            {"guided_decoding_guide_type": "json", "guided_json": "{}"},
            "guided_json is '{}' and guided_decoding_guide_type is",
        ),
        ({"guided_choice": ["a"], "regex": "b"}, "guided_choice is 'a' and regex is 'b'; give one of them"),
        ({"structured_outputs": {"regex": "b", "choice": ["a"]}}, "structured_outputs.choice is 'a'; give one of them"),
        ({"stop": [5]}, "stop is [5], allowed: text or a list of texts"),
        ({"block_length": "9" * 5000}, "allowed: an integer"),
        ({"image": "aGVsbG8="}, "unknown parameter 'image'"),
        ({"structured_outputs": "[" * 300_000}, "structured_outputs holds 300000 lists and objects, allowed: at most"),
        ({"guided_choice": "[" * 300_000}, "guided_choice holds 300000 lists and objects, allowed: at most 262144"),
    ],
)
def test_what_cannot_be_meant_is_refused(sampling: dict[str, Any], fragment: str) -> None:
    with pytest.raises(RequestError, match=re.escape(fragment)):
        read({"text_input": ["x"], "sampling_parameters": [json.dumps(sampling)]}, {}, {})


SCHEMA = '{"enum": [1]}'


@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        ({"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": SCHEMA}, {"json_schema": SCHEMA}),
        ({"guided_decoding_guide_type": "json"}, {"json_schema": {"type": "object"}}),
        ({"guided_json": SCHEMA}, {"json_schema": SCHEMA}),
        ({"n": 1, "best_of": "1"}, {}),
        ({"structured_outputs": '{"json": {"enum": [1]}}'}, {"json_schema": {"enum": [1]}}),
        ({"structured_outputs": {"json": SCHEMA, "regex": None, "disable_fallback": False}}, {"json_schema": SCHEMA}),
        ({"structured_outputs": {"json": {}}}, {"json_schema": {}}),
        ({"guided_decoding": '{"json_object": true}'}, {"json_schema": {"type": "object"}}),
        ({"guided_decoding": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a.b", "c|d"]}}, {"regex": r"a\.b|c\|d"}),
        ({"guided_choice": ["yes", "no"]}, {"regex": "yes|no"}),
        ({"structured_outputs": {"grammar": "start: A", "disable_any_whitespace": True}}, {"grammar": "start: A"}),
        ({"guided_grammar": "start: A"}, {"grammar": "start: A"}),
        (
            {"guided_decoding_guide_type": "ebnf_grammar", "guided_decoding_guide": "root ::= A"},
            {"grammar": "root ::= A"},
        ),
        ({"guided_choice": '["yes", "no"]'}, {"regex": "yes|no"}),
        ({"guided_decoding": None, "structured_outputs": "{}"}, {}),
    ],
)
def test_what_an_answer_must_be_in_the_words_of_other_backends(
    sampling: dict[str, Any], options: dict[str, Any]
) -> None:
    assert read({"text_input": ["x"], "sampling_parameters": [json.dumps(sampling)]}, {}, {}).options == options


@pytest.mark.parametrize("name", ["return_log_probs", "return_logprobs", "return_cumulative_logprob"])
def test_log_probabilities_by_any_of_their_names(name: str) -> None:
    assert read({"text_input": ["x"], name: [True]}, {}, {}).options == {"logprobs": 0}
    assert read({"text_input": ["x"], name: [False]}, {}, {}).options == {}
    sampling = {"sampling_parameters": ['{"logprobs": 3}']}
    assert read({"text_input": ["x"], name: [True], **sampling}, {}, {}).options == {"logprobs": 3}


def test_without_a_server_one_line_says_how_to_get_one(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(executable, "installed", lambda: False)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.pbtxt").touch()
    refused(["triton", "run", str(tmp_path)], "no Triton server found", "nemodiff triton install", "container")
    refused(["triton", "run", str(tmp_path / "none")], "no such folder", "nemodiff triton export")


def test_what_is_no_repository_is_not_served(tmp_path: Path, tiny_engine: Path, refused: Refused) -> None:
    refused(["triton", "run", str(tmp_path)], "holds no model", "nemodiff triton export")
    refused(["triton", "run", str(tiny_engine)], "holds no model", "nemodiff triton export")
    model = export(tiny_engine, tmp_path / "models", link=True)
    refused(["triton", "run", str(model)], "is a model and not a repository", f"nemodiff triton run {model.parent}")


def test_a_server_on_the_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "tritonserver"
    program.write_text(f'#!{sys.executable}\nimport sys\nprint("\\n".join(sys.argv[1:]))\nsys.exit(3)\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "models").mkdir()
    log = tmp_path / "log"
    with pytest.raises(ServerError, match="tritonserver has ended with code 3; see its log"):
        triton_server.TritonServer(tmp_path / "models", ports=(1, 2, 3), arguments=["--log-verbose=1"], log=log)
    arguments = log.read_text().splitlines()
    assert arguments[0] == f"--model-repository={tmp_path / 'models'}"
    assert {"--http-port=1", "--grpc-port=2", "--metrics-port=3", "--http-address=127.0.0.1"} < set(arguments)
    assert arguments[-1] == "--log-verbose=1"
    assert CliRunner().invoke(main, ["triton", "run", "--help"]).exit_code == 0


def test_the_manifest_holds_together() -> None:
    parts = {part["kind"]: part for part in yaml.safe_load_all((EXAMPLE / "kubernetes.yaml").read_text())}
    assert set(parts) == {"Service", "Deployment", "PodDisruptionBudget", "PodMonitor"}
    deployment = parts["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert deployment["replicas"] > 1
    labels = deployment["template"]["metadata"]["labels"]
    assert parts["Service"]["spec"]["selector"] == deployment["selector"]["matchLabels"] == labels
    assert {port["targetPort"] for port in parts["Service"]["spec"]["ports"]} < set(ports)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
        assert container[probe]["httpGet"]["path"] in ("/v2/health/ready", "/v2/models/nemodiff/ready")
    (endpoint,) = parts["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert ports[endpoint["port"]] == 8002
    (drain,) = [word for word in container["args"] if "--exit-timeout-secs" in word]
    waits = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > waits + int(drain.partition("=")[2])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("release", ["1.27", kubernetes_validate.latest_version()])
def test_the_manifest_is_what_kubernetes_takes(release: str) -> None:
    checked = 0
    for part in yaml.safe_load_all((EXAMPLE / "kubernetes.yaml").read_text()):
        if part["kind"] != "PodMonitor":  # of the Prometheus operator
            kubernetes_validate.validate(part, release, strict=True)
            checked += 1
    assert checked == 3
    part["kind"], part["apiVersion"], part["spec"] = "Service", "v1", {"ports": [{"prot": 1}]}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(part, release, strict=True)


def test_the_dockerfile_names_what_is_there() -> None:
    text = (EXAMPLE / "Dockerfile").read_text()
    assert set(re.findall(r"^([A-Z]+) ", text, re.MULTILINE)) <= {
        *("FROM", "ARG", "COPY", "RUN", "USER", "EXPOSE", "STOPSIGNAL", "CMD")
    }
    command = json.loads(re.findall(r"^CMD (.*)$", text, re.MULTILINE)[0])
    assert command[0] == "tritonserver"
    shell = re.findall(r"^RUN (.*)$", text, re.MULTILINE)[0]
    subprocess.run(["bash", "-n", "-c", shell], check=True)


def test_gpus_have_an_instance_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module())
    engine = Builder(TINY_CHAT, tmp_path / "engine", backend="torch", dtype="f32").run()
    folder = export(engine, tmp_path / "models", gpus=[0, 2])
    assert "instance_group [ { count: 1 kind: KIND_GPU gpus: [0, 2] } ]" in (folder / "config.pbtxt").read_text()
    loaded: list[Any] = []

    def load(*_: Any, device: Any, **__: Any) -> Any:
        loaded.append(device)
        raise EngineError("enough")

    monkeypatch.setattr("nemodiff.serving.triton_server.model.load", load)
    place = {"model_repository": str(folder), "model_version": "1", "model_name": "nemodiff", "model_config": "{}"}
    for kind, number in (("GPU", "2"), ("MODEL", "0")):
        with pytest.raises(Exception, match="enough"):
            TritonPythonModel().initialize({**place, "model_instance_kind": kind, "model_instance_device_id": number})
    assert loaded == [2, None]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--gpu", "1"], "is built for onnxruntime"),
        (["--gpu", "1", "--set", "device=cuda:0"], "--set device says where"),
    ],
)
def test_gpus_that_no_instance_could_take(
    tiny_engine: Path, tmp_path: Path, refused: Refused, flags: list[str], problem: str
) -> None:
    refused(["triton", "export", str(tiny_engine), "--repo", str(tmp_path / "models"), *flags], problem)
