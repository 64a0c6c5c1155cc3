# `smkd app` on a CPU (docs/app.md):
#   docker build -t smkd .
#   docker run --rm -p 127.0.0.1:7860:7860 -v "$PWD/runs:/runs:ro" smkd --backbone /runs/mine
FROM python:3.12-slim

# from PyTorch's own index: the one of PyPI brings gigabytes of CUDA
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.7,<2.14"

WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY src src
# what is installed is this folder
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[app]" \
    && rm -r /build/* \
    && useradd --create-home --uid 1000 smkd

USER 1000
WORKDIR /home/smkd
EXPOSE 7860
HEALTHCHECK --start-period=60s --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/', timeout=4)"]
ENTRYPOINT ["smkd", "app", "--host", "0.0.0.0"]
