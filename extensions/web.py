"""A web page and the HTTP APIs that image tools speak, on this machine: `make web`, or

    python -m extensions.web --port 7860

The page is at /, the API of Stable Diffusion web UIs at /sdapi/v1/, OpenAI's at /v1/ (see `web_api.py`). Nobody else is
let in: requests must name this machine as their Host (or a strange page could reach it by DNS rebinding) and come from
no other page than its own (`--cors` names others); an address that other machines reach needs a user and a password.
"""

import argparse
import base64
import binascii
import hmac
import ipaddress
import os
import socket
import sys
import threading
from collections.abc import Sequence
from urllib.parse import urlsplit

INSTALL = "the web page needs {}: pip install -r extensions/requirements-web.txt"
BODY = 2**26  # bytes of a request's body


def main():
    try:
        arguments = parse_arguments()
        sock = bind(arguments.host, arguments.port)
        serve(arguments, sock)
    except KeyboardInterrupt:
        leave("stopped")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def parse_arguments():
    parser = argparse.ArgumentParser(prog="python -m extensions.web", description="A web page and an API that draw.")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="the address to listen on (%(default)s); others than this machine's own "
        "loopback need --user and --password")
    add("--port", type=int, default=7860, help="the port (%(default)s)")
    add("--user", default=os.environ.get("WEB_USER"), help="who is let in (the environment's WEB_USER)")
    add("--password", default=os.environ.get("WEB_PASSWORD"),
        help="with what (the environment's WEB_PASSWORD, which other users of this machine do not see)")
    add("--output", metavar="FOLDER", help="keep every picture in this folder (none is kept)")
    add("--checkpoint", help="a .ckpt or .safetensors file of SD 1.x, or a diffusers folder (the newest in data/)")
    add("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (auto)")
    add("--cors", metavar="ORIGIN", action="append", default=[],
        help="let the pages of this origin, such as https://lite.koboldai.net, use the API; once for each")
    arguments = parser.parse_args()
    check(arguments)
    return arguments


def check(arguments):
    """Raises ValueError, in one line, for options that do not go together."""
    if bool(arguments.user) != bool(arguments.password):
        raise ValueError("--user and --password go together; give both or none")
    if not is_loopback(arguments.host) and not arguments.password:
        raise ValueError(f"--host {arguments.host} lets other machines in; give --user and --password with it, or "
                         f"leave it out")
    if not 0 <= arguments.port < 2**16:
        raise ValueError(f"--port is {arguments.port}; give a number from 0 (any that is free) to 65535")
    if ":" in (arguments.user or ""):
        raise ValueError("--user has a colon in it, which HTTP does not allow; give another name")
    for origin in arguments.cors:
        parts = urlsplit(origin)
        if origin != "null" and f"{parts.scheme}://{parts.netloc}" != origin:
            raise ValueError(f"--cors is {origin!r}; give an origin such as https://lite.koboldai.net, without a path")


def is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host, port):
    """Returns a socket that listens on an address. Raises OSError, in one line, if the port is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":  # on Windows it would let two servers have one port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
        return sock
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror}); name another with --port, or stop what "
                      f"uses it") from None


def serve(arguments, sock):
    """Serves until it is told to stop, by Ctrl-C or SIGTERM."""
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError(INSTALL.format(error.name)) from None
    from extensions.studio import Studio

    studio = Studio(arguments.checkpoint, arguments.dtype, arguments.output)
    app = create_app(studio, arguments.user, arguments.password, arguments.cors, arguments.host)

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame):
            # The one limit: uvicorn's own, were it shorter, would cancel what is under way with a traceback.
            timer = threading.Timer(1.2, leave, ["stopped"])
            timer.daemon = True
            timer.start()
            studio.close()  # so that whoever waits for a picture is answered
            super().handle_exit(sig, frame)

    server = Server(uvicorn.Config(app, log_level="warning", server_header=False))
    host, port = sock.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"checkpoint {studio.checkpoint}, device {studio.device}: {url}", flush=True)
    server.run(sockets=[sock])
    studio.worker.join(0.3)
    leave("stopped")


def leave(text):
    """Ends the process, be there a step of a large network under way or not, which takes seconds."""
    if page := sys.modules.get("extensions.web_page"):
        page.temporary_folder().cleanup()
    print(text, flush=True)
    sys.stderr.flush()
    os._exit(0)


def create_app(studio, user: str | None = None, password: str | None = None, cors: Sequence[str] = (),
               host: str = "127.0.0.1", page: bool = True):
    """Returns the ASGI app: page and APIs behind the guard.

    Args:
        studio: a `studio.Studio`.
        user, password: who is let in; None lets everybody in who can reach it.
        cors: origins of other pages that may use the API.
        host: the address it listens on, by which requests may call it.
        page: whether to have the page beside the API.

    Raises:
        ImportError: something is not installed.
    """
    try:
        from fastapi import FastAPI
        from starlette.middleware.cors import CORSMiddleware
    except ImportError as error:
        raise ImportError(INSTALL.format(error.name)) from None
    from extensions import web_api

    app = FastAPI(title="Stable Diffusion", docs_url=None, redoc_url=None)  # these pages load scripts from elsewhere
    web_api.add_routes(app, studio)
    if page:
        app = mount_page(app, studio)
    app = Door(app, user, password)
    if cors:
        app = CORSMiddleware(app, allow_origins=list(cors), allow_methods=["GET", "POST"], allow_headers=["*"],
                             allow_credentials=True, allow_private_network=True)
    return Guard(app, cors, host)


def mount_page(app, studio):
    try:
        import gradio

        from extensions.web_page import LOOK, build_page
    except ImportError as error:
        raise ImportError(INSTALL.format(error.name)) from None
    return gradio.mount_gradio_app(app, build_page(studio), path="/", max_file_size=studio.limits.upload, **LOOK)


class Guard:
    """Lets in what calls this machine by its own name, and what comes from its own page or from an origin of --cors."""

    def __init__(self, app, cors, host):
        self.app, self.cors, self.host = app, set(cors), host
        self.is_local = is_loopback(host)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = dict(scope["headers"])
        host, origin = (headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin"))
        if not self.knows(host):
            return await refuse(scope, send, 403, f"the Host {host!r:.80} is not this server; call it by its address")
        if origin and origin not in self.cors and origin.partition("://")[2] != host:
            return await refuse(scope, send, 403, f"the Origin {origin!r:.80} is not let in; start the server with "
                                f"--cors {origin:.80} for it")
        await self.app(scope, receive, send)

    def knows(self, host):
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if self.is_local:
            return name == "localhost" or is_loopback(name)
        own = {"localhost", self.host.lower(), socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"}
        return name in own or is_address(name)  # which no DNS server can rebind


def is_address(name):
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class Door:
    """Asks for user and password, if there are any, and lets in no body that is too large."""

    def __init__(self, app, user, password):
        self.app = app
        self.user, self.password = (user or "").encode(), (password or "").encode()

    async def __call__(self, scope, receive, send):
        from starlette.exceptions import HTTPException

        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if self.password and not self.admits(headers.get(b"authorization", b"")):
            return await refuse(scope, send, 401, "user and password are wanted (HTTP Basic, or Bearer with the "
                                "password)", [(b"www-authenticate", b'Basic realm="Stable Diffusion"')])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > BODY:
            return await refuse(scope, send, 413, f"the request is too large; send at most {BODY} bytes")
        received = 0

        async def receive_limited():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > BODY:
                raise HTTPException(413, f"the request is too large; send at most {BODY} bytes")
            return message

        await self.app(scope, receive_limited, send)

    def admits(self, authorization):
        kind, _, value = authorization.partition(b" ")
        if kind.lower() == b"bearer":
            return hmac.compare_digest(value.strip(), self.password)
        try:
            user, _, password = base64.b64decode(value).partition(b":")
        except binascii.Error:
            return False
        # both are compared, whatever the first comparison says, so that the time tells nothing
        return hmac.compare_digest(user, self.user) & hmac.compare_digest(password, self.password)


async def refuse(scope, send, status, message, headers=()):
    from starlette.responses import JSONResponse

    from extensions.web_api import error_body

    response = JSONResponse(error_body(scope["path"], status, message), status)
    response.raw_headers.extend(headers)
    await response(scope, None, send)


if __name__ == "__main__":
    main()
