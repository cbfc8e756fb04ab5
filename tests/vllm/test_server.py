"""The OpenAI API on loopback: the plugin found by its entry point, several requests at a time, budgets of requests."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

import vtoken
from vtoken import tiny
from vtoken.integrations.vllm import overrides

from .environment import vllm  # noqa: F401
from .prompts import NEW, answer, cases

pytestmark = pytest.mark.vllm
START = 240  # seconds
MODEL = str(tiny.path("llava"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server") / "log") as address:
        yield address


@contextmanager
def serving(log, *more):
    """The address of a server of the tiny LLaVA under hired at 0.2.

    Args:
        log: file. more: further arguments of the command.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    told = json.dumps(overrides(MODEL, "hired", 0.2)["hf_overrides"])
    # `vllm serve` asks for a distribution that is called vllm, which the CPU build is not
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        MODEL,
        "--hf-overrides",
        told,
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "8", "--trust-request-mm-kwargs", *more]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as file:
        running = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(START):
            assert running.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(address + "/health", timeout=1)
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        running.terminate()
        running.wait(30)


def question_of(case):
    """The text that the template wrote into a prompt of one image."""
    return case.prompt.split("\n", 1)[1].rsplit(" assistant", 1)[0]


def ask(address, case, question, **more):
    """(text, prompt tokens) of one question about one image."""
    said = completion(address, case, question, **more)
    return said["choices"][0]["message"]["content"].strip(), said["usage"]["prompt_tokens"]


def completion(address, case, question, engine=None, **more):
    """The server's whole answer; of one of its engines, or of that which the server chooses."""
    picture = io.BytesIO()
    case.images[0].save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": NEW,
        "temperature": 0,
    }
    data = json.dumps(body | more).encode()
    headers = {"Content-Type": "application/json"}
    if engine is not None:
        headers["X-data-parallel-rank"] = str(engine)
    call = urllib.request.Request(address + "/v1/chat/completions", data, headers)
    return json.load(urllib.request.urlopen(call, timeout=120))


def test_eight_at_a_time(server):
    model, processor = tiny.load("llava")
    vtoken.patch(model, "hired", budget=0.2)
    some = [answer(model, processor, c) for c in cases(processor, videos=0) if c.kind == "image"]
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda case: ask(server, case, question_of(case)), some))
    assert [text for text, _ in said] == [c.text for c in some]
    assert max(tokens for _, tokens in said) < 60  # 144 patches of an image are 28


def test_budgets_of_requests(server):
    _, processor = tiny.load("llava")
    case = cases(processor, 1, 0)[0]
    question = "how many objects are there?"

    def tokens(budget):
        return ask(server, case, question, mm_processor_kwargs={"vtoken_budget": budget})[1]

    usual = ask(server, case, question)[1]
    assert (
        tokens(0.1) == usual - 28 + 14 and tokens(0.5) == usual - 28 + 72 and tokens(1.0) == usual - 28 + 144
    )
    for wrong in (1.5, 0, "many", 1):
        with pytest.raises(urllib.error.HTTPError) as caught:
            tokens(wrong)
        assert caught.value.code == 400 and "udget" in caught.value.read().decode()
    assert ask(server, case, question)[1] == usual  # it lives
