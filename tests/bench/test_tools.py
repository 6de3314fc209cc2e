"""aiperf's environment and process, and the server under load: what goes wrong, and what is left behind."""

from __future__ import annotations

import json
import re
import sys
import threading
import venv
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from ridgewalk.bench import bench_run, environment
from ridgewalk.bench.aiperf import AiperfFailed, Load, aiperf_command, run_aiperf, write_input
from ridgewalk.bench.endpoint import Endpoint, find_endpoint, warm_up
from ridgewalk.bench.environment import Aiperf, SetupError, ensure_aiperf, named_aiperf
from ridgewalk.bench.report import read_report, write_report
from ridgewalk.bench.tokenizer_source import load_tokenizer
from ridgewalk.bench.workload import RequestShape
from ridgewalk.cli import app
from ridgewalk.config import ConfigError
from ridgewalk.replica.host import free_port
from ridgewalk.zoo import zoo_path
from tests.bench.builders import point, report

RECORD = {
    "metadata": {"conversation_id": "request-0", "request_start_ns": 1, "request_end_ns": 2},
    "metrics": {},
}


def program(folder: Path, lines: str) -> Path:
    """An executable Python script."""
    path = folder / "aiperf"
    path.write_text(f"#!{sys.executable}\n{lines}\n")
    path.chmod(0o755)
    return path


def silent(line: str) -> None:
    """Nobody listens."""


@pytest.fixture
def bare_venv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual environments without contents: pip takes seconds."""

    def create(folder: Path, with_pip: bool) -> None:
        (folder / "bin").mkdir(parents=True)
        (folder / "pyvenv.cfg").write_text("")

    monkeypatch.setattr(venv, "create", create)


@pytest.mark.usefixtures("bare_venv")
def test_an_interrupted_setup_is_made_again_and_a_whole_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, installed = tmp_path / "env", []

    def install(into: Path, say: object) -> None:
        installed.append(sorted(path.name for path in into.rglob("*") if path.is_file()))
        (into / "bin" / "aiperf").write_text("")
        if len(installed) == 1:
            raise KeyboardInterrupt  # after the program was there, before all that it needs was

    monkeypatch.setattr(environment, "_install", install)
    with pytest.raises(KeyboardInterrupt):
        ensure_aiperf(folder, silent)
    assert ensure_aiperf(folder, silent) == Aiperf(folder / "bin" / "aiperf", environment.AIPERF_VERSION)
    assert installed == [[".ridgewalk", "pyvenv.cfg"]] * 2
    ensure_aiperf(folder, silent)
    assert len(installed) == 2


@pytest.mark.usefixtures("bare_venv")
def test_an_index_out_of_reach_is_said_with_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "env"
    bare = venv.create

    def create(into: Path, with_pip: bool) -> None:
        bare(into, with_pip=with_pip)
        pip = program(into / "bin", "print('ERROR: No matching distribution found for aiperf'); raise SystemExit(1)")
        pip.rename(into / "bin" / "python")

    monkeypatch.setattr(venv, "create", create)
    with pytest.raises(SetupError, match=r"No matching distribution found for aiperf; let pip reach .* --aiperf"):
        ensure_aiperf(folder, silent)
    assert not (folder / environment._WHOLE).exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("of another environment")
    with pytest.raises(ConfigError, match="holds something else than aiperf's"):
        ensure_aiperf(tmp_path, silent)
    assert (tmp_path / "pyvenv.cfg").exists()
    with pytest.raises(ConfigError, match="--aiperf: nowhere is not a program"):
        named_aiperf("nowhere")


def test_the_version_of_an_aiperf_that_the_user_has_is_asked_for(tmp_path: Path) -> None:
    path = program(tmp_path, "print('aiperf 0.14.2rc1')")
    assert named_aiperf(str(path)) == Aiperf(path, "0.14.2rc1")
    with pytest.raises(ConfigError, match=r"--aiperf: .* --version failed .*; is it aiperf's program"):
        named_aiperf("false")
    with pytest.raises(ConfigError, match=r"--aiperf: .* --version says no version; is it aiperf's program"):
        named_aiperf(str(program(tmp_path, "print('hello')")))


def test_progress_is_read_while_it_runs_and_records_at_the_end(tmp_path: Path) -> None:
    path = program(
        tmp_path, f"open({str(tmp_path / 'profile_export.jsonl')!r}, 'w').write({json.dumps(RECORD)!r} + '\\n')"
    )
    seen: list[int] = []
    (request,) = run_aiperf([str(path)], tmp_path, 1, seen.append, None)
    assert request.index == 0
    assert seen[-1] == 1


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("print('ERROR no tokenizer'); raise SystemExit(3)", "left no records.*ERROR no tokenizer"),
        ("RECORD; raise SystemExit(3)", "status 3 after 1 of 2"),
        ("RECORD_ERROR", "all 1 requests failed: 500 Oops"),
    ],
)
def test_an_aiperf_that_fails_leaves_its_last_words(tmp_path: Path, lines: str, problem: str) -> None:
    write = f"open({str(tmp_path / 'profile_export.jsonl')!r}, 'w').write"
    failed = {**RECORD, "error": {"code": 500, "type": "Oops"}}
    lines = lines.replace("RECORD_ERROR", f"{write}({json.dumps(failed)!r})")
    path = program(tmp_path, lines.replace("RECORD", f"{write}({json.dumps(RECORD)!r})"))
    with pytest.raises(AiperfFailed, match=problem):
        run_aiperf([str(path)], tmp_path, 2, lambda done: None, None)


def test_an_interrupt_ends_aiperf_and_what_it_started(tmp_path: Path) -> None:
    path = program(
        tmp_path,
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'profile_export.jsonl')!r}, 'w').write(f'{{child.pid}}\\n')\n"
        "time.sleep(600)",
    )
    started: list[psutil.Process] = []

    def interrupt(done: int) -> None:
        if done:
            pid = int((tmp_path / "profile_export.jsonl").read_text())
            started.extend([psutil.Process(pid), psutil.Process(pid).parent()])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_aiperf([str(path)], tmp_path, 1, interrupt, None)
    assert len(started) == 2
    assert not any(process.is_running() for process in started)


def test_the_key_is_not_on_the_command_line_and_reaches_aiperf(tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    path = program(tmp_path, f"import sys; open({str(heard)!r}, 'w').write(' '.join(sys.argv[-3:]))")
    endpoint = Endpoint("http://127.0.0.1:1", "m", None, "sesame", True, None, None)
    command = aiperf_command(
        path, endpoint, Load(concurrency=3), tmp_path / "in", 9, tmp_path, seed=1, force=True
    )  # fmt: skip
    assert not any("sesame" in word for word in command)
    with pytest.raises(AiperfFailed):
        run_aiperf(command, tmp_path, 9, lambda done: None, endpoint.api_key)
    assert heard.read_text() == "3 --api-key sesame"


def test_each_request_is_handed_over_with_its_own_length(tmp_path: Path) -> None:
    shapes = [RequestShape(1, 5, 10.0), RequestShape(1, 7, 20.0)]
    write_input(tmp_path / "in", ["a", "b"], shapes, timed=True)
    assert [json.loads(line) for line in (tmp_path / "in").read_text().splitlines()] == [
        {"session_id": "request-0", "text": "a", "output_length": 5, "timestamp": 10.0},
        {"session_id": "request-1", "text": "b", "output_length": 7, "timestamp": 20.0},
    ]


class _Server(BaseHTTPRequestHandler):
    """Two models, and metrics of somebody else."""

    def do_GET(self) -> None:
        cards = [{"id": "big", "max_model_len": 9}, {"id": "small"}]
        reply = json.dumps({"data": cards}) if self.path == "/v1/models" else "other_metric 1\n"
        self.send_response(401 if self.headers.get("Authorization") == "Bearer wrong" else 200)
        self.end_headers()
        self.wfile.write(reply.encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(400)
        self.end_headers()
        self.wfile.write(b'{"error": {"message": "ignore_eos is not a field"}}')

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


class _Listener(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has heard enough leaves."""


@pytest.fixture
def url() -> Iterator[str]:
    server = _Listener(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_another_server_is_taken_as_one_and_its_model_must_be_named(url: str) -> None:
    endpoint = find_endpoint(f"{url}/v1/", "big", None)
    assert (endpoint.url, endpoint.max_model_len, endpoint.is_ridgewalk) == (url, 9, False)
    with pytest.raises(ConfigError, match=r"--model: .* serves several models; name one of big, small"):
        find_endpoint(url, None, None)
    with pytest.raises(ConfigError, match=r"--model: .* does not serve 'huge'; it serves big, small"):
        find_endpoint(url, "huge", None)
    with pytest.raises(ConfigError, match=r"--api-key: .* wants a key"):
        find_endpoint(url, "big", "wrong")


def test_a_server_that_refuses_the_load_is_heard_before_it_begins(url: str) -> None:
    endpoint, tokenizer = find_endpoint(url, "small", None), load_tokenizer("demo-dense", "small")
    with pytest.raises(ConfigError, match=r"--url: .* refused .*ignore_eos is not a field.*; --no-force-lengths"):
        warm_up(endpoint, tokenizer, seed=0, force=True)


def test_nobody_at_the_url_is_said() -> None:
    with pytest.raises(ConfigError, match=r"--url: no server answers at http://127.0.0.1"):
        find_endpoint(f"127.0.0.1:{free_port('127.0.0.1')}", None, None)


def test_a_tokenizer_is_found_by_name_folder_or_file_and_else_asked_for() -> None:
    folder = zoo_path("demo-dense")
    for named in ("demo-dense", str(folder), str(folder / "tokenizer.json")):
        assert load_tokenizer(named, "whatever").get_vocab_size() > 0
    with pytest.raises(ConfigError, match="--tokenizer: none is known for the model 'gpt'; name a folder"):
        load_tokenizer(None, "gpt")
    with pytest.raises(ConfigError, match="--tokenizer: '/nowhere' could not be read"):
        load_tokenizer("/nowhere", "gpt")


def test_the_command_compares_two_reports_without_sending_anything(tmp_path: Path) -> None:
    for name in "ab":
        write_report(report(point(4)), tmp_path / f"{name}.json")
    arguments = [
        "bench",
        "--compare",
        str(tmp_path / "a.json"),
        str(tmp_path / "b.json"),
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "1.00 times as many" in result.output
    assert (tmp_path / "out" / "compare.html").is_file()
    refused = CliRunner().invoke(app, [*arguments, "--concurrency", "4", "--no-force-lengths"])
    assert isinstance(refused.exception, ConfigError)
    assert str(refused.exception) == (
        "--compare: it draws two reports and sends nothing; leave out --concurrency, --force-lengths"
    )


@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_what_cannot_be_written_is_said_before_anything_is_sent(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    refuse_out(tmp_path, f"{name} cannot be written: Is a directory; name another folder")


def test_a_folder_that_takes_no_files_is_said_before_anything_is_sent() -> None:
    refuse_out(Path("/proc/self"), "/proc/self cannot be written: .*; name another folder")  # root's neither


def refuse_out(folder: Path, problem: str) -> None:
    nobody = f"http://127.0.0.1:{free_port('127.0.0.1')}"  # would be the error, were it asked
    result = CliRunner().invoke(app, ["bench", "--url", nobody, "--concurrency", "1", "--out", str(folder)])
    assert isinstance(result.exception, ConfigError)
    with pytest.raises(ConfigError, match=f"--out: .*{problem}"):
        raise result.exception


@pytest.mark.parametrize(
    ("at_the_second_load", "said", "status"),
    [
        ("print('ERROR out of luck'); raise SystemExit(3)", "failed and is missing here.*: aiperf .*out of luck", 1),
        ("os.kill(os.getppid(), signal.SIGINT); signal.pause()", r"was interrupted and is missing here.*\.", 130),
    ],
)
def test_loads_that_are_complete_outlive_one_that_is_not(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, at_the_second_load: str, said: str, status: int
) -> None:
    monkeypatch.setattr(bench_run, "warm_up", lambda *args, **others: 0)
    path = program(
        tmp_path,
        "import json, os, signal, sys\n"
        "if '--version' in sys.argv: print('0.14.2'); raise SystemExit\n"
        "flags = dict(zip(sys.argv[2:], sys.argv[3:]))\n"
        f"if flags['--concurrency'] == '2': {at_the_second_load}\n"
        f"record = {RECORD!r}\n"
        "with open(flags['--output-artifact-dir'] + '/profile_export.jsonl', 'w') as records:\n"
        "    for index in range(int(flags['--request-count'])):\n"
        "        record['metadata']['conversation_id'] = f'request-{index}'\n"
        "        print(json.dumps(record), file=records)",
    )
    arguments = ["bench", "--url", url, "--model", "small", "--tokenizer", "demo-dense", "--aiperf", str(path)]
    arguments += ["--profile", "chat", "--requests", "4", "--concurrency", "1,2,4", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == status, result.output
    written = read_report(tmp_path / "out" / "report.json")
    assert [each.concurrency for each in written.points] == [1]
    assert written.aiperf_version == "0.14.2"
    (missing,) = [sentence for sentence in written.findings if "missing" in sentence]
    assert re.fullmatch(rf"The load at concurrency 2 {said}", missing)
    assert "and so are those after it (concurrency 4)" in missing
    assert missing in result.stderr
    assert "is missing here" in (tmp_path / "out" / "report.html").read_text()
