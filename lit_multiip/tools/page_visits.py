"""Who is on the page: a session a visitor, which ends some time after its connection."""

from __future__ import annotations

import secrets
import threading

import gradio as gr

from lit_multiip.tools.page_session import Session, Studio

KEEP = 600  # seconds that a session outlives its connection: a telephone that slept comes back to it


class Sessions:
    """The sessions by gradio's name of a connection; one ends `KEEP` seconds after its connection does."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.lock = studio, threading.Lock()
        self.found: dict[str, Session] = {}
        self.leaving: dict[str, threading.Timer] = {}

    def find(self, request: gr.Request) -> Session:
        """Return the visitor's session, a new one at their first visit."""
        name = str(request.session_hash)
        with self.lock:
            if timer := self.leaving.pop(name, None):
                timer.cancel()
            if name not in self.found:
                self.found[name] = Session(self.studio, secrets.token_urlsafe(16))
            return self.found[name]

    def leave(self, request: gr.Request) -> None:
        """End a session soon, unless its visitor comes back."""
        name = str(request.session_hash)
        with self.lock:
            if name in self.found and name not in self.leaving:
                timer = self.leaving[name] = threading.Timer(KEEP, self.end, [name])
                timer.daemon = True
                timer.start()

    def end(self, name: str) -> None:
        """End a session now."""
        with self.lock:
            session = self.found.pop(name, None)
            self.leaving.pop(name, None)
        if session is not None:
            session.end()

    def close(self) -> None:
        """End all sessions."""
        for timer in list(self.leaving.values()):
            timer.cancel()
        for session in list(self.found.values()):
            session.stopping = session.ended = True
        for name in list(self.found):
            self.end(name)
