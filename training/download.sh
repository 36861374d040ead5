#!/bin/sh
# Fetches the pictures and the words, by package name, into a folder outside the repository.
# Usage: sh training/download.sh FOLDER
set -eu
folder=${1:?the folder for the data, for example ../data}
mkdir -p "$folder"
cd "$folder"
npm install --no-audit --no-fund --ignore-scripts --no-save --prefix . \
    @lobehub/fluent-emoji-3d@1.1.0 \
    @iconify-json/noto@1.2.9 \
    fluentui-emoji@1.3.0 \
    unicode-emoji-json@0.9.0 \
    emojilib@4.0.3 \
    emojibase-data@17.0.0 \
    @iconify-json/twemoji@1.2.5
