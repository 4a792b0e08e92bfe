"""Additions to mkdocs: pages of files outside docs/, links to code, and a check of all links.

docs/*.md are written for GitHub, where ``../README.md`` is a link.  On the site, such a link points
to the page of that file, or to the repository, if ``FASTLORA_REPOSITORY`` has its address.
"""

import os
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
REPOSITORY = os.getenv("FASTLORA_REPOSITORY", "").rstrip("/")
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
}
REFERENCE = ROOT / "docs" / "reference.md"
# An item of the reference: a name, a link to the file, and a line about it.
_ITEM = re.compile(r"^\* \[`fastlora\.(\S+)`\]\(.*$", re.M)
_CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.S | re.M)
_SENTENCE = r"(?<=[.;])\s+(?=[`A-Z])"
_BADGE = re.compile(r"^(?:\[!\[[^\]]*\]\(\S+\)\]\(\S+\)|!\[[^\]]*\]\((?:http|\.\./)\S+\))\n", re.M)
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s]+)\)")


def title(page: str) -> str:
    return (ROOT / page).read_text().partition("\n")[0].removeprefix("# ")


def relink(text: str, folder: str) -> str:
    """A file's Markdown, without badges, with its links as a page in docs/ needs them.

    Links are relative to ``folder``.  A badge is a picture of another host.
    """
    text = _BADGE.sub("", text)

    def link(found: re.Match) -> str:
        path, hash_, anchor = found[3].partition("#")
        if not path or urlsplit(path).scheme:
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, path))
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif REPOSITORY:  # paths outside of the files are GitHub's pages, such as ../../../issues
            outside = path.lstrip("./") if path.startswith("../") else f"blob/main/{path}"
            path = f"{REPOSITORY}/{outside}"
        else:
            return found[2]
        name = title(found[2]) if found[2] == f"docs/{path}" else found[2]
        return f"{found[1]}[{name}]({path}{hash_}{anchor})"

    # A link's text may be code, so code in backticks is replaced by marks until the end.
    aside: list[str] = []
    text = _CODE.sub(lambda code: f"\0{aside.append(code[0]) or len(aside) - 1}\0", text)
    return re.sub("\0(\\d+)\0", lambda mark: aside[int(mark[1])], _LINK.sub(link, text))


def part_of_readme(found: re.Match) -> str:
    """The text for ``<!-- README.md -->``, which is above its first section, or for the sections of
    ``<!-- README.md: A, B -->``.
    """
    top, *sections = re.split(r"^(?=## )", (ROOT / "README.md").read_text(), flags=re.M)
    if not found[1]:
        return relink(top.partition("\n")[2].strip(), "")
    by_name = {section[3:].partition("\n")[0]: section for section in sections}
    return relink("".join(by_name[name] for name in found[1].split(", ")).strip(), "")


def on_files(files, config):
    for path, page in PAGES.items():
        if page != "index.md":
            text = relink((ROOT / path).read_text(), posixpath.dirname(path))
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.generated_by:
        return markdown
    if page.file.src_uri == REFERENCE.name:
        markdown = _ITEM.sub(directive, markdown)
    text = relink(markdown, "docs")
    return re.sub(r"<!-- README\.md(?:: ([^>]*))? -->", part_of_readme, text)


def directive(item: re.Match) -> str:
    """The docstring in place of an item of the reference, which is for GitHub."""
    members = "\n    options: { members: true }" if item[1] == "reference" else ""
    return f"::: fastlora.{item[1]}{members}"


class Roles(griffe.Extension):
    """Make links of ``:func:`fastlora.optimize``` and ``docs/peft.md`` in docstrings."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            text = re.sub(r":\w+:`~?([\w.]+)`", _reference(obj), obj.docstring.value)
            obj.docstring.value = re.sub(r"\bdocs/\w+\.md", lambda page: _page(page[0]), text)

    def on_package(self, *, pkg, **_):
        """Every function and class of the reference gets a table of its parameters."""
        for name in _ITEM.findall(REFERENCE.read_text()):
            obj = pkg[name].final_target if pkg[name].is_alias else pkg[name]
            if obj.is_function or obj.is_class:
                first, gap, rest = obj.docstring.value.partition("\n\n")
                names = "|".join(each.name for each in obj.parameters)
                rest = re.sub(rf"^\* ``(?:{names})``.*(?:\n  .*)*\n?", "", rest, flags=re.M)
                obj.docstring.value = f"{first}\n\n{parameters(obj)}{gap}{rest}"


def parameters(obj) -> str:
    """A table: names, types, defaults, and the sentences and list items that open with a name."""
    text = obj.docstring.value
    lines = [" ".join(item.split()) for item in re.findall(r"^\* (.*(?:\n  .*)*)", text, re.M)]
    for block in re.split(r"\n\s*(?:\n|\* )", text):
        lines += re.split(_SENTENCE, " ".join(block.split()))
    rows = []
    for each in obj.parameters:
        if each.name == "self" or each.kind.name.startswith("var"):
            continue
        named = re.compile(rf"(?:``\w+``, )*``{each.name}``(?:, ``\w+``)*(?::| is| are) ")
        about = re.compile(rf"{named.pattern}|(?:With )?``{each.name}(?:=\w+)?``")
        meaning = next(filter(about.match, lines), "")
        meaning = named.sub("", meaning, count=1).rstrip(";.").replace("|", "\\|")
        default = "required" if each.default is None else f"`{each.default}`"
        rows.append((f"`{each.name}`", f"`{each.annotation}`", default, meaning))
    head = ("parameter", "type", "default", "meaning")
    width = 4 if any(row[3] for row in rows) else 3
    table = [head, ("---",) * 4, *rows] if rows else []
    return "\n".join("| " + " | ".join(row[:width]) + " |" for row in table)


def _page(name: str) -> str:
    return f"[{title(name)}]({name.removeprefix('docs/')})"


def _reference(obj):
    def reference(found: re.Match) -> str:
        name = found[1].removeprefix("fastlora.")
        public = name in obj.package.members
        own = name == found[1] and obj.path.startswith("fastlora.reference.")
        inside = "fastlora.reference" if own else "fastlora"
        return f"[`{inside}.{name}`][{inside}.{name}]" if public else f"`{name}`"

    return reference


class _Page(HTMLParser):
    """The links of a built page, its anchors, and the files that it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag != "a" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loaded += [found[name] for name in ("href", "src") if found.get(name)]


def on_post_build(config):
    """Check that every link of the built pages works, and that no page loads from another host."""
    site = Path(config.site_dir)
    pages = {path: _Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    faults = []
    for path, page in pages.items():
        for target in [*page.links, *page.loaded]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loaded and parts.scheme != "data":
                    faults.append(f"{path.name} loads {target}")
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            anchor = unquote(parts.fragment)
            if not file.exists() or (
                anchor and file in pages and anchor not in pages[file].anchors
            ):
                faults.append(f"{path.name}: {target}")
    if faults:
        raise PluginError("links that lead nowhere:\n  " + "\n  ".join(sorted(set(faults))))
