"""A stand-in for a chat endpoint in OpenAI's form, on loopback, that does what a script says."""

import contextlib
import http.server
import json
import threading


class Chat:
    """What was asked, and what is answered: `reply(body)` gives a text, or (status, headers, body).

    A reply of None comes never: the server waits until it is closed.
    """

    def __init__(self, reply):
        self.reply, self.asked, self.keys, self.closed = reply, [], [], threading.Event()
        self.lock = threading.Lock()


def said(text, **usage):
    """An answer that holds a text."""
    told = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return json.dumps({**told, "usage": usage or {"prompt_tokens": 10, "completion_tokens": 2}})


@contextlib.contextmanager
def serve(reply):
    """(chat, its address)."""
    chat = Chat(reply)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with chat.lock:
                chat.asked.append(body)
                chat.keys.append(self.headers.get("Authorization"))
                found = chat.reply(body) if self.path == "/v1/chat/completions" else (404, {}, "")
            if found is None:
                chat.closed.wait()
                return
            status, headers, text = found if isinstance(found, tuple) else (200, {}, said(found))
            content = text.encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield chat, f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        chat.closed.set()
        server.shutdown()
        thread.join()
        server.server_close()
