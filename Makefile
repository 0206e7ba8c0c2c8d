# Every target sets up what it needs in .venv; `make demo` and `make test` are all a newcomer types.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install -q --disable-pip-version-check
export DS_BUILD_OPS := 0

.PHONY: demo test coverage notebook sanitize lint types wheel clean
