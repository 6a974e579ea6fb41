# The BIDS App as an image. `docker build -t tlseg .` makes the CPU image; PyPI holds the CUDA build:
#   docker build --build-arg TORCH_INDEX=https://pypi.org/simple -t tlseg:cuda .
# BASE may be any image with Python 3.11 or newer and its venv module (docs/container.md).
ARG BASE=docker.io/library/python:3.11-slim-bookworm
FROM ${BASE}

ARG TORCH=torch==2.13.0
# Empty: whatever pip is configured to use.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# PyTorch and the other requirements come before the source, so that a change of the source does
# not fetch them again.
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${TORCH}"
COPY pyproject.toml /opt/tlseg/
RUN /opt/venv/bin/python -c "import tomllib; \
print(*tomllib.load(open('/opt/tlseg/pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > /tmp/requirements.txt \
 && /opt/venv/bin/pip install --no-cache-dir -r /tmp/requirements.txt \
 && rm /tmp/requirements.txt
COPY README.md LICENSE bids_app_entry.py /opt/tlseg/
COPY tlseg_bids /opt/tlseg/tlseg_bids
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps /opt/tlseg \
 && rm -rf /opt/tlseg/tlseg_bids /opt/tlseg/pyproject.toml \
 && chmod -R a+rX /opt/tlseg /opt/venv/lib/python3*/site-packages/tlseg_bids*

# The root file system may be read-only and the user anyone: what must be written goes to /tmp.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    LANG=C.UTF-8

# The version that is built; derivatives name the image that made them.
ARG VERSION=unknown
ENV TLSEG_CONTAINER=docker:tlseg:${VERSION}
LABEL org.opencontainers.image.title="tlseg" \
      org.opencontainers.image.description="A BIDS App that labels the structures of the brain in any T1w or T2w scan" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"

# -I: no PYTHONPATH and no user site-packages of the host reach into the image.
ENTRYPOINT ["/opt/venv/bin/python", "-I", "/opt/tlseg/bids_app_entry.py"]
