"""`ssm-vlm serve` as a real process, asked over HTTP as OpenAI's clients ask."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from compat_toys import encode, question
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.import_utils import is_serve_available

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason="needs fastapi, uvicorn, openai and pydantic"),
]


@pytest.fixture
def server(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ssm_vlm", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    base = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 240
    while True:
        try:
            urlopen(f"{base}/health", timeout=5).close()
            break
        except (URLError, ConnectionError, TimeoutError):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise AssertionError(f"the server did not start:\n{process.stdout.read()[-4000:]}") from None
            time.sleep(0.5)
    yield base
    process.terminate()
    process.wait(30)


def ask(base, model, picture, **fields):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what colour is it?"}]
    body = {"model": str(model), "messages": [{"role": "user", "content": content}], **fields}
    request = Request(f"{base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as response:
        return response.read().decode()


def test_answers_about_a_picture(server, folder, pictures):
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    answers = []
    for picture in pictures.values():
        inputs = encode(processor, [question(picture)], add_generation_prompt=True)
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        reply = json.loads(ask(server, folder, picture, stream=False, max_tokens=6, temperature=0.0))
        answers.append(reply["choices"][0]["message"]["content"])
        assert answers[-1].strip() == processor.decode(ids, skip_special_tokens=True).strip()
    assert answers[0] != answers[1]
    streamed = ask(server, folder, pictures["red"], stream=True, max_tokens=6, temperature=0.0)
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert text.strip() == answers[0].strip()
