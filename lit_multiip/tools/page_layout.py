"""What the page shows, and what its buttons do: components of gradio around a `Session` a visitor."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
import jinja2
import torch

from lit_multiip.console import explain
from lit_multiip.data.photos import Photo
from lit_multiip.evaluation.person import IDENTITY
from lit_multiip.files import package_file
from lit_multiip.methods.adapter import MultiIPAdapter
from lit_multiip.personalizer import Personalizer
from lit_multiip.tools.page_session import (
    BESIDE,
    KINDS,
    NEGATIVES,
    PHOTOS,
    Drawn,
    PageError,
    Session,
    Studio,
    read_seeds,
)
from lit_multiip.tools.page_visits import Sessions
from lit_multiip.tuning import STEPS, Progress

logger = logging.getLogger(__name__)

PROMPT = "a photo of a smiling person, in a red shirt, in front of a blue wall"
LOADED, TUNED = "as loaded", "tuned"
NONE = "none"
SUFFIXES = [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".txt"]
INTRODUCTION = """# Pictures of a person, from photos
{method} on `{backbone}`, on {device}. Photos stay on the machine that serves this page, and are deleted, with all that
was made of them, ten minutes after you close it."""
UNSCORED = (
    """<p class="quiet">No network compares faces here: serve the page with --score and a file of configs/score/.</p>"""
)


def in_sentences(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Show an error in the page, in one sentence; a fault of the program goes to the console too."""

    @wraps(handler)
    def handle(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            sentence = explain(error)
            if isinstance(error, torch.OutOfMemoryError):
                sentence = "the memory of the device is full: serve the page with --dtype bfloat16, or another --device"
            elif sentence is None:
                logger.exception("the page failed")
                sentence = "this failed by a fault of the program: the console of the page says where"
            raise gr.Error(html.escape(sentence), duration=20, print_exception=False) from None

    return handle


class Page:
    """The page, for any number of visitors; one picture is drawn at a time."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.sessions = studio, Sessions(studio)
        text = package_file("tools/page.html.jinja").read_text(encoding="utf-8")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        self.parts: Any = environment.from_string(text).module
        self.blocks = self._build()

    def launch(self, host: str, port: int) -> str:
        """Serve the page from threads, and return its address."""
        try:
            _, url, _ = self.blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,
                ssr_mode=False,
                enable_monitoring=False,
                max_file_size="50mb",
                footer_links=[],
                theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
                css_paths=[package_file("tools/page.css")],
            )
        except OSError as error:
            raise PageError(f"the page cannot be served at {host}:{port} ({error}): give another --port") from error
        return str(url)

    def close(self) -> None:
        """Stop serving, and end all sessions."""
        self.blocks.close(verbose=False)
        self.sessions.close()

    # ---- layout -----------------------------------------------------------------------------------------------------

    def _build(self) -> gr.Blocks:
        model = self.studio.base.model
        facts = {"method": model.method(), "backbone": model.backbone.path, "device": str(model.device)}
        with gr.Blocks(title="Pictures of a person", analytics_enabled=False) as blocks:
            gr.Markdown(INTRODUCTION.format(**facts))
            with gr.Row():
                with gr.Column(min_width=320):
                    shown, clear = self._build_photos()
                    chosen = shown[1:3]
                with gr.Column(min_width=320):
                    asked, further = self._build_drawing(chosen, shown[-1])
            clear.click(
                in_sentences(self.clear), None, [*shown, *further], api_name="clear", **waiting_for_photos(shown[0])
            )
            with gr.Row():
                with gr.Column(min_width=320):
                    self._build_tuning(chosen, asked)
                with gr.Column(min_width=320):
                    self._build_export(chosen, asked[-1])
            blocks.unload(self.sessions.leave)
            gr.Timer(60).tick(self.ping, None, None, show_progress="hidden", queue=False, api_visibility="private")
        return blocks.queue(default_concurrency_limit=1, max_size=50)

    def _build_photos(self) -> tuple[list[Any], Any]:
        """Build where photos are added; return what shows them and chooses among them, and the button to delete all."""
        gr.Markdown("## 1. Photos of one person")
        upload = gr.File(
            label="Photos",
            file_count="multiple",
            file_types=SUFFIXES,
            height=150,
        )
        gr.Markdown("Nine are best, from five on you can tune. A text file with a photo's name is its prompt.")
        with gr.Row():
            drawn = self.studio.base.model.backbone.path == "mini"
            example = gr.Button("Take a drawn person", size="sm", visible=drawn)
            clear = gr.Button("Delete all photos", size="sm")
        cards = gr.HTML(elem_classes="waits")
        use = gr.CheckboxGroup(label="Draw from", choices=[], visible=False)
        held_out = gr.Dropdown(
            choices=[NONE],
            value=NONE,
            label="Held-out photo",
            info="Nothing is drawn from it: pictures are compared with it.",
            visible=False,
        )
        with gr.Accordion("How much each photo counts", open=False, visible=self._weighs()):
            gr.Markdown(
                "A photo of weight 2 counts as two, one of 0 is left out. All 1: as many are drawn from as in training."
            )
            table = gr.Dataframe(
                [],
                headers=["Photo", "Weight"],
                datatype=["str", "number"],
                type="array",
                interactive=True,
                static_columns=[0],
                show_label=False,
            )
        shown, waiting = [cards, use, held_out, table], waiting_for_photos(cards)
        upload.upload(in_sentences(self.add_photos), upload, [upload, *shown], api_name="add_photos", **waiting)
        example.click(in_sentences(self.add_example), None, shown, api_name="add_example", **waiting)
        return shown, clear

    def _weighs(self) -> bool:
        """Tell whether the method feels that a photo is given twice."""
        model = self.studio.base.model
        return isinstance(model, MultiIPAdapter) and model.aggregator.counts_repeats

    def _build_drawing(self, chosen: Sequence[Any], table: Any) -> tuple[list[Any], list[Any]]:
        """Build where pictures are drawn; return what says how, and what shows photos to draw away from and beside."""
        model = self.studio.base.model
        sampling, adapter = model.sampling, not model.per_person
        gr.Markdown("## 2. Draw")
        prompt = gr.Textbox(PROMPT, label="Prompt", info="The person is 'a person' in it.", lines=2)
        seeds = gr.Textbox("0, 1", label="Seeds", info="A picture each.")
        with gr.Row():
            by_block = isinstance(sampling.ip_scale, dict)
            value = 1.0 if isinstance(sampling.ip_scale, dict) else sampling.ip_scale
            info = "Weight of the photos."
            scale = gr.Slider(
                0, 2, value, step=0.05, label="ip_scale", info=info, min_width=140, visible=adapter and not by_block
            )
            guidance = gr.Slider(
                1, 15, sampling.guidance_scale, step=0.5, label="Guidance", info="Weight of the text.", min_width=140
            )
            steps = gr.Slider(1, 100, sampling.steps, step=1, label="Steps", info="Of denoising.", min_width=140)
        with gr.Accordion("When the photos act", open=False, visible=adapter), gr.Row():
            start = gr.Slider(0, 1, sampling.ip_start, step=0.05, label="From this share of the steps", min_width=140)
            end = gr.Slider(0, 1, sampling.ip_end, step=0.05, label="To this share", min_width=140)
        with gr.Accordion("Photos to draw away from", open=False, visible=adapter):
            unlike = self._build_further(NEGATIVES, "Of anybody; the pictures get less like them.")
        with gr.Accordion("A second person, on the right", open=False, visible=adapter):
            beside = self._build_further(BESIDE, "Photos of that person; the prompt must name two people.")
            border = gr.Slider(0.1, 0.9, 0.5, step=0.05, label="Begins at this share of the width")
        weights = gr.Radio([LOADED, TUNED], value=LOADED, label="Weights", info="Tuned: after step 3.")
        draw = gr.Button("Draw", variant="primary")
        pictures, shares = gr.HTML(elem_classes="waits"), gr.HTML()
        asked = [prompt, seeds, scale, guidance, steps, start, end, weights]
        draw.click(
            in_sentences(self.draw),
            [*chosen, *asked, table, border],
            [pictures, shares],
            concurrency_id="model",
            show_progress_on=pictures,
            api_name="draw",
        )
        return asked, [unlike, beside]

    def _build_further(self, kind: str, text: str) -> Any:
        """Build where further photos are added; return what shows them."""
        gr.Markdown(text)
        upload = gr.File(label="Photos", file_count="multiple", file_types=SUFFIXES, height=120)
        remove = gr.Button("Remove them", size="sm")
        cards, of = gr.HTML(), gr.State(kind)
        waiting = waiting_for_photos(cards)
        added = [upload, cards]
        upload.upload(in_sentences(self.add_further), [of, upload], added, api_name=f"add_{kind}", **waiting)
        remove.click(in_sentences(self.remove_further), of, cards, api_name=f"remove_{kind}", **waiting)
        return cards

    def _build_tuning(self, chosen: Sequence[Any], asked: Sequence[Any]) -> None:
        gr.Markdown("## 3. Tune on the photos")
        number = gr.Number(
            STEPS, label="Steps", info="Five photos or more; one or two of them are held out.", precision=0
        )
        with gr.Row():
            tune = gr.Button("Tune", variant="primary")
            stop = gr.Button("Stop", variant="stop")
        result = gr.HTML(elem_classes="waits")
        weights = asked[-1]
        # so that a second tuning is refused at once, and does not wait for the first one's end
        tune.click(
            in_sentences(self.tune),
            [*chosen, number, *asked[:-1]],
            [result, weights],
            concurrency_limit=None,
            show_progress_on=result,
            api_name="tune",
        )
        stop.click(in_sentences(self.stop), None, None, concurrency_limit=None, show_progress="hidden", api_name="stop")

    def _build_export(self, chosen: Sequence[Any], weights: Any) -> None:
        gr.Markdown("## 4. Take away")
        name = gr.Textbox("person", label="Name", info="Of the person, in the files. Their photos are not in them.")
        export = gr.Button("Make the files")
        files = gr.File(label="For plain diffusers and ComfyUI", interactive=False, visible=False)
        export.click(
            in_sentences(self.export), [*chosen, weights, name], files, concurrency_id="model", api_name="export"
        )

    # ---- photos -----------------------------------------------------------------------------------------------------

    def ping(self, request: gr.Request) -> None:
        """Keep a visitor's session."""
        self.sessions.find(request)

    def add_photos(self, files: list[str] | None, request: gr.Request) -> tuple[Any, ...]:
        """Take uploaded files."""
        session = self.sessions.find(request)
        for sentence in session.add(files or []):
            gr.Warning(html.escape(sentence), duration=20)
        return None, *self._show_photos(session)

    def add_example(self, request: gr.Request) -> tuple[Any, ...]:
        """Take photos of a drawn person, in place of those that are there."""
        session = self.sessions.find(request)
        session.add_example()
        return self._show_photos(session)

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        """Delete all photos, of all kinds."""
        session = self.sessions.find(request)
        for kind in KINDS:
            session.clear(kind)
        return *self._show_photos(session), "", ""

    def add_further(self, kind: str, files: list[str] | None, request: gr.Request) -> tuple[None, str]:
        """Take uploaded files of photos to draw away from, or of a second person."""
        session = self.sessions.find(request)
        for sentence in session.add(files or [], kind):
            gr.Warning(html.escape(sentence), duration=20)
        return None, str(self.parts.photos(session.checked(kind), session, address))

    def remove_further(self, kind: str, request: gr.Request) -> str:
        """Delete them."""
        self.sessions.find(request).clear(kind)
        return ""

    def _show_photos(self, session: Session) -> tuple[Any, ...]:
        """Show each photo with what is known of it, and choose the usable ones, less one that is held out."""
        checked = session.checked(PHOTOS)
        names = [one.photo.name for one in checked]
        good = [one.photo.name for one in checked if one.usable]
        readable = [one.photo.name for one in checked if "unreadable" not in one.faults]
        out = good[-1] if len(good) > 5 else NONE
        shown = bool(names)
        return (
            str(self.parts.photos(checked, session, address)) if names else "",
            gr.CheckboxGroup(choices=readable, value=[name for name in good if name != out], visible=shown),
            gr.Dropdown(choices=[NONE, *readable], value=out, visible=shown),
            [[name, 1] for name in readable],
        )

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def draw(
        self,
        use: list[str],
        held_out: str | None,
        prompt: str,
        seeds: str,
        scale: float,
        guidance: float,
        steps: float,
        start: float,
        end: float,
        weights: str,
        table: list[list[Any]],
        border: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio looks for it here
    ) -> tuple[str, str]:
        """Draw pictures, and say how like they are and what each photo contributed."""
        session = self.sessions.find(request)
        me, out = session.personalizer(use or [], without_none(held_out), weights == TUNED)
        if me.is_tuning:
            progress(0, desc="a tuning goes on, and this waits for its end")
        options = self._options(scale, guidance, steps, start, end)
        acting = session.acting(me, table, border)
        wanted, bar = read_seeds(seeds or ""), tell(progress, "drawing")
        drawn = session.draw(me, out, prompt or "", wanted, options, bar, acting)
        shares = self._show_shares(session, me, me.choose_photos(**acting)[0])
        return self._show_pictures(session, [("", drawn)]), shares

    def tune(
        self,
        use: list[str],
        held_out: str | None,
        number: float,
        prompt: str,
        seeds: str,
        scale: float,
        guidance: float,
        steps: float,
        start: float,
        end: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio looks for it here
    ) -> tuple[str, Any]:
        """Tune, and draw the same pictures before and after, from the same photos."""
        session, options = self.sessions.find(request), self._options(scale, guidance, steps, start, end)
        session.check_request(prompt or "", wanted := read_seeds(seeds or ""))

        def follow(now: Progress) -> None:
            found = now.scores.get(IDENTITY)
            score = "" if found is None else f", identity {found:.2f}"
            progress((now.step, now.steps), desc=f"tuning{score}", unit="steps")

        progress(0, desc="drawing the held-out photos' prompts before tuning")
        me = session.tune(use or [], without_none(held_out), number, follow)
        tuned = me.tuned
        assert tuned is not None
        groups = []
        for title, one in (("Before", self.studio.base.with_photos(list(tuned.photos))), ("After", me)):
            drawn = session.draw(
                one, tuned.held_out, prompt, wanted, options, tell(progress, f"drawing {title.lower()}")
            )
            groups.append((title, drawn))
        names = ", ".join(photo.name for photo in tuned.held_out)
        text = f"Held out, and not tuned on: {names}. Step {tuned.steps} is kept."
        if IDENTITY in tuned.before and IDENTITY in tuned.after:
            text += (
                f" Drawn from the held-out photos' prompts, identity to them was {tuned.before[IDENTITY]:.2f} and is "
                f"{tuned.after[IDENTITY]:.2f}."
            )
        return f'<p class="quiet">{html.escape(text)}</p>' + self._show_pictures(session, groups), TUNED

    def stop(self, request: gr.Request) -> None:
        """End the visitor's tuning with the best weights so far."""
        self.sessions.find(request).stopping = True
        gr.Info("The tuning ends after this step; the best weights so far are kept.", duration=5)

    def export(self, use: list[str], held_out: str | None, weights: str, name: str, request: gr.Request) -> Any:
        """Write the files, as one ZIP file."""
        session = self.sessions.find(request)
        me, _ = session.personalizer(use or [], without_none(held_out), weights == TUNED, (name or "").strip())
        return gr.File(value=str(session.export(me)), visible=True)

    def _options(self, scale: float, guidance: float, steps: float, start: float, end: float) -> dict[str, Any]:
        """Return options of `Sampling`; an `ip_scale` by block, which the page does not show, stays."""
        model = self.studio.base.model
        options: dict[str, Any] = {"guidance_scale": guidance, "steps": steps}
        if model.per_person:
            return options
        own = model.sampling.ip_scale
        return options | {"ip_scale": own if isinstance(own, dict) else scale, "ip_start": start, "ip_end": end}

    def _show_pictures(self, session: Session, groups: Sequence[tuple[str, list[Drawn]]]) -> str:
        unscored = "" if self.studio.judge() is not None else UNSCORED
        return unscored + str(self.parts.pictures(groups, session, address))

    def _show_shares(self, session: Session, me: Personalizer, references: Sequence[Photo]) -> str:
        what, shares = session.shares(me, references)
        photos = session.photos
        rows = [(name, share, session.thumbnail(photos[name])) for name, share in shares.items()]
        return str(self.parts.shares(rows, what, address))


def address(file: Path) -> str:
    """Return the address of a file of a session, relative to the page's."""
    return f"gradio_api/file={quote(file.as_posix())}"


def waiting_for_photos(cards: Any) -> dict[str, Any]:
    """Return options of an event that changes photos: one at a time, and `cards` show that it goes on."""
    return {"concurrency_id": "photos", "show_progress_on": cards}


def without_none(choice: str | None) -> str | None:
    """Return a photo's name; None where none is chosen."""
    return None if choice in (None, NONE) else choice


def tell(progress: gr.Progress, what: str) -> Callable[[int, int], None]:
    """Return what moves the bar on by a picture."""
    return lambda done, of: progress((done, of), desc=what, unit="pictures")
