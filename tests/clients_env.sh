#!/bin/sh
# Makes environments with other versions of `datasets` and the libraries of their time: clients_env.sh FOLDER PYTHON
set -eu
folder=$1
python=$2

environment() {
    name=$1
    shift
    "$python" -m venv "$folder/$name"
    "$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

environment 3.6 "datasets==3.6.*" "huggingface_hub==0.31.*" "pyarrow==20.*" "pandas==2.2.*"
environment 4.4 "datasets==4.4.0" "huggingface_hub==1.1.*" "pyarrow==22.*" "pandas==2.3.*"
environment 5.2 "datasets==5.2.*" "huggingface_hub==2.4.*" "pyarrow==26.*" duckdb polars
