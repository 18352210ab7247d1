"""The server: who is let in, what is refused, and how it ends."""

import base64
import os
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from web_server import serving

from extensions import web
from extensions.web import bind, create_app

ROOT = Path(__file__).parent.parent
PROGRESS = "/sdapi/v1/progress"


@pytest.fixture(scope="module")
def locked(studio):
    with serving(create_app(studio, "ann", "pass:wörd", page=False)) as url:
        yield url


def ask(url, path=PROGRESS, method="GET", **headers):
    """Returns status and headers, of a request with just these headers."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": urlsplit(url).netloc, **headers}.items():
        if value is not None:
            connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    assert answer.status < 400 or "Traceback" not in text
    return answer.status, answer.headers


# ---- Host and Origin


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "localhost:7860", "[::1]:80", "127.0.0.1:1"])
def test_this_machines_names_are_let_in(url, host):
    assert ask(url, Host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "10.0.0.1", "",
                                  "localhost.evil.example", "localhost@evil.example", "[", "0.0.0.0"])
def test_other_names_are_not(url, host):
    """DNS rebinding: a page of evil.example whose name now leads to this machine."""
    assert ask(url, Host=host)[0] == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1.evil.example",
                                    "http://localhost:1", "garbage"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_other_pages_are_not(url, origin, method):
    assert ask(url, method=method, Origin=origin)[0] == 403


def test_its_own_page_is(url):
    assert ask(url, Origin=url)[0] == 200


def test_origins_of_cors(studio):
    with serving(create_app(studio, "ann", "secret", ["https://lite.koboldai.net"], page=False)) as url:
        friend = {"Origin": "https://lite.koboldai.net"}
        status, headers = ask(url, method="OPTIONS", Access_Control_Request_Method="POST",
                              Access_Control_Request_Headers="content-type,authorization", **friend)
        assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://lite.koboldai.net"
        assert "authorization" in headers["Access-Control-Allow-Headers"]
        status, headers = ask(url, **friend)
        assert status == 401 and headers["Access-Control-Allow-Origin"]  # a page can read why
        assert ask(url, Origin="http://evil.example")[0] == 403


def test_without_cors_nothing_is_said_of_it(url):
    assert "Access-Control-Allow-Origin" not in ask(url)[1]


def test_an_address_that_others_reach(studio):
    """It answers to its own names and to addresses, which no name server can change, and to nothing else."""
    guard = web.Guard(None, [], "0.0.0.0")
    for host in ("192.168.1.7:7860", "localhost", socket.gethostname(), "[fe80::1]:7860"):
        assert guard.knows(host.lower()), host
    for host in ("evil.example", "192.168.1.7.evil.example", ""):
        assert not guard.knows(host)


# ---- user and password


def basic(text):
    return f"Basic {base64.b64encode(text.encode()).decode()}"


@pytest.mark.parametrize("authorization, path", [
    (basic("ann:pass:wörd"), PROGRESS), ("Bearer pass:wörd", "/v1/models"), ("bearer pass:wörd", PROGRESS)])
def test_who_knows_the_password_is_let_in(locked, authorization, path):
    assert ask(locked, path, Authorization=authorization.encode())[0] == 200


@pytest.mark.parametrize("authorization", [
    None, "", "Basic", "Basic Og==", "Basic !", basic("ann:wrong"), basic("bob:pass:wörd"), basic(":"), basic("ann"),
    "Bearer", "Bearer wrong", "Bearer ", "pass:wörd", "Digest ann"])
@pytest.mark.parametrize("path", [PROGRESS, "/v1/models", "/", "/sdapi/v1/options"])
def test_nobody_else_is(locked, authorization, path):
    status, headers = ask(locked, path, Authorization=authorization and authorization.encode())
    assert status == 401 and headers["WWW-Authenticate"].startswith("Basic")


def test_without_a_password_an_empty_header_does_no_harm(url):
    assert ask(url, Authorization="Basic Og==")[0] == 200


# ---- size of bodies


def test_bodies_that_are_too_large(url, monkeypatch):
    assert ask(url, "/sdapi/v1/txt2img", "POST", Content_Length=str(2**40))[0] == 413
    assert 400 <= ask(url, "/sdapi/v1/txt2img", "POST", Content_Length="9" * 5000)[0] < 500
    monkeypatch.setattr(web, "BODY", 10_000)
    chunks = iter([b" " * 9000] * 9)
    assert requests.post(f"{url}/sdapi/v1/txt2img", data=chunks, timeout=20).status_code == 413


# ---- the command


def run(*arguments, **environment):
    """Returns the last line that the command prints when it cannot begin."""
    done = subprocess.run([sys.executable, "-m", "extensions.web", *map(str, arguments)], cwd=ROOT, timeout=60,
                          capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr.strip()


@pytest.mark.parametrize("arguments, told", [
    (["--host", "0.0.0.0"], "give --user and --password"), (["--host", "example.invalid", "--user", "a"], "--password"),
    (["--user", "a"], "--password"), (["--cors", "*"], "--cors"), (["--cors", "https://a.example/b"], "--cors"),
    (["--port", "99999"], "--port"), (["--user", "a:b", "--password", "c"], "colon")])
def test_options_that_do_not_go_together(monkeypatch, arguments, told):
    monkeypatch.setattr(sys, "argv", ["web", *arguments])
    with pytest.raises(ValueError, match=told):
        web.parse_arguments()


def test_the_password_may_come_from_the_environment(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["web", "--host", "0.0.0.0"])
    monkeypatch.setenv("WEB_USER", "ann")
    monkeypatch.setenv("WEB_PASSWORD", "secret")
    assert web.parse_arguments().password == "secret"


def test_a_busy_port_is_one_line():
    with bind("127.0.0.1", 0) as sock:
        told = run("--port", sock.getsockname()[1])
    assert told.startswith("error: cannot listen on 127.0.0.1") and "\n" not in told


def test_what_is_missing_is_named_with_its_command(studio, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ImportError, match="pip install -r extensions/requirements-web.txt"):
        create_app(studio)


def test_ctrl_c_ends_it_in_the_middle_of_a_picture(data, tmp_path):
    """By a process of its own; what it was drawing is answered, and nothing half-written is left."""
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "extensions.web", "--port", str(port), "--checkpoint", data / "tiny.safetensors",
               "--dtype", "float32", "--output", tmp_path / "kept"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        url = f"http://127.0.0.1:{port}"
        assert requests.get(f"{url}{PROGRESS}", timeout=60).status_code == 200
        body = b'{"steps": 150, "width": 512, "height": 512}'
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
                               b"\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body)
            while not requests.get(f"{url}{PROGRESS}", timeout=60).json()["progress"]:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            began = time.monotonic()
            process.wait(20)
            assert time.monotonic() - began < 10  # two seconds, on a machine that is not busy
        assert process.stderr.read() == "" and list((tmp_path / "kept").iterdir()) == []
