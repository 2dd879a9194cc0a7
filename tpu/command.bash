# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# What the scripts of this folder share, which source it: SELF is their name in messages, DRY_RUN prints and does nothing.

SELF=${SELF:?the script that sources this file says its name}
DRY_RUN=${DRY_RUN:-}

fail() {
  printf '%s: %s\n' "$SELF" "$*" >&2
  exit 2
}

# `need NAME...`: stops unless these variables are set.
need() {
  local name
  for name in "$@"; do
    [[ -n ${!name} ]] || fail "$name is not set: export $name=... (the top of this file says what it is)"
  done
}

# `call COMMAND...`: runs it, or prints it.
call() {
  if [[ -n $DRY_RUN ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# `take_words "$@"`: puts all words into the array `words` but --dry-run, which may stand anywhere.
take_words() {
  local word
  words=()
  for word in "$@"; do
    if [[ $word == --dry-run ]]; then DRY_RUN=1; else words+=("$word"); fi
  done
}
