"""The dashboard's server: who may open it, and its start.

The dashboard reads run directories and writes one file, the feedback (community/feedback_file.py). A model's text
is shown as text, never as markup. Names from the browser are looked up among the runs found; no file is opened by name.
"""

import ipaddress
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.errors import ConfigError
from grpo.tools.dashboard.board import Board
from grpo.tools.dashboard.page import build

if TYPE_CHECKING:
    import gradio as gr

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


def check_exposure(host: str, share: bool, auth: tuple[str, str] | None) -> None:
    """Raise ConfigError for a page that others could open without a password."""
    if auth is not None or (_is_loopback(host) and not share):
        return
    what = "--share" if share else f"--host {host}"
    raise ConfigError(
        f"{what} lets anybody read these runs and use their models: set a name and a password first, "
        f"GRPO_DASHBOARD_AUTH=name:password in the environment or in .env; or leave {what.split()[0]} out"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    root: Path,
    feedback: Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    block: bool = True,
) -> tuple["gr.Blocks", str]:
    """Start the dashboard's server.

    Args:
        root: The folder that holds run directories.
        feedback: The file to append feedback to.
        host: The address to listen on.
        port: The port; None: the first free one from 7860.
        share: Create a public address through gradio's servers.
        auth: Name and password.
        block: Return only when the server ends.

    Returns:
        The page and its address.

    Raises:
        ConfigError: No such folder, no gradio, a port in use, or a public page without a password.
    """
    check_exposure(host, share, auth)
    if not root.is_dir():
        raise ConfigError(f"--runs {root}: there is no such folder. Give the one that holds your run directories")
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError('the dashboard needs gradio: pip install -e ".[dashboard]"') from error
    import matplotlib

    # gradio asks for the backend before each event, which imports pyplot as long as none is chosen.
    matplotlib.use("agg")
    board = Board(root, feedback)
    threading.Thread(target=board.read_newest, daemon=True).start()
    page = build(board)
    try:
        _, address, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            auth=auth,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            ssr_mode=False,
            allowed_paths=[],
            blocked_paths=[str(root.resolve()), str(Path.cwd()), str(feedback.resolve())],
            footer_links=[],
            theme=_theme(gr),
            css=STYLE,
        )
    except OSError as error:
        raise ConfigError(f"--port {port or 7860}: {error}. Choose another one with --port") from error
    address = public or address
    print(f"dashboard of {root}: {address}  (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return page, address


def _theme(gr: Any) -> Any:
    system = ("ui-sans-serif", "system-ui", "sans-serif")
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        radius_size="md",
        font=system,  # fetching fonts would tell other servers that the page was opened
        font_mono=("ui-monospace", "monospace"),
    )
