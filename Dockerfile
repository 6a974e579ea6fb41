# The BIDS App as an image; docs/container.md has the commands.
#   docker build -t tlseg .                                       CPU
#   docker build --build-arg VARIANT=cuda -t tlseg:cuda .         NVIDIA GPU
# BASE may be any image with Python 3.11 and its venv module; pin it by digest for a release.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# --- what the program requires: pinned, hashed, and in a layer of its own -----------------------
FROM ${BASE} AS requirements
# cpu or cuda: which container/requirements-*.txt.
ARG VARIANT=cpu
# Where pip finds the CPU build of PyTorch beside PyPI; empty: what pip is configured to use. The
# hashes decide what is taken, from wherever it comes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Times in the image do not depend on when it was built.
ARG SOURCE_DATE_EPOCH=0
ENV SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH} PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY container/requirements-build.txt /build/
RUN python3 -m venv /build/venv \
 && /build/venv/bin/pip install --require-hashes -r /build/requirements-build.txt
COPY container/requirements-${VARIANT}.txt /build/requirements.txt
COPY container/requirements-alone.txt /build/
# Left out: headers and tests, which nothing imports. Byte code does not depend on times; PyTorch has a
# file (py312_…) that Python 3.11 cannot compile.
RUN python3 -m venv --without-pip /opt/venv \
 && /build/venv/bin/pip --python /opt/venv/bin/python install --require-hashes --no-deps \
      ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -r /build/requirements.txt \
      -r /build/requirements-alone.txt \
 && site=/opt/venv/lib/python3.11/site-packages \
 && rm -rf $site/torch/include $site/torch/test $site/torch/bin/protoc* \
      $site/pandas/tests $site/scipy/*/tests $site/numpy/*/tests $site/nibabel/tests \
      $site/nitransforms/tests $site/prov/tests $site/matplotlib/tests $site/sklearn/*/tests \
 && /opt/venv/bin/python -m compileall -q -j 0 -x '/py312_' --invalidation-mode unchecked-hash $site

# --- the program --------------------------------------------------------------------------------
FROM requirements AS program
COPY pyproject.toml README.md LICENSE bids_app_entry.py /build/source/
COPY tlseg_bids /build/source/tlseg_bids
# --root: only what this step adds is copied into the image.
RUN cd /build/source \
 && /build/venv/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /build/wheel . \
 && /build/venv/bin/pip --python /opt/venv/bin/python install --no-deps /build/wheel/*.whl \
 && /build/venv/bin/pip --python /opt/venv/bin/python install --no-deps --root /build/root \
      --ignore-installed /build/wheel/*.whl \
 && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /build/root \
      -s /build/root \
 && mkdir -p /build/root/opt/tlseg \
 && cp README.md LICENSE bids_app_entry.py /build/root/opt/tlseg/ \
 && /build/venv/bin/cyclonedx-py environment --output-reproducible --of JSON \
      -o /build/root/opt/tlseg/sbom.cdx.json /opt/venv/bin/python \
 && chmod -R a+rX /build/root

# --- templates for --output-spaces --------------------------------------------------------------
FROM program AS templates
# Spaces of TemplateFlow, separated by blanks; empty: none. One that cannot be fetched is left out.
ARG TEMPLATES="MNI152NLin2009cAsym"
COPY container/templates.py /build/
RUN mkdir -p /build/templates/opt/templateflow \
 && TEMPLATEFLOW_HOME=/build/templates/opt/templateflow HOME=/tmp \
      timeout 900 /opt/venv/bin/python -W ignore /build/templates.py ${TEMPLATES} \
 && chmod -R a+rX /build/templates

# --- the image ----------------------------------------------------------------------------------
FROM ${BASE}
COPY --from=requirements /opt/venv /opt/venv
COPY --from=templates /build/templates/opt /opt
COPY --from=program /build/root/opt /opt

# The root file system may be read-only and the user anyone: what must be written goes to /tmp.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    TEMPLATEFLOW_HOME=/opt/templateflow \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 \
    LANG=C.UTF-8

# The version that is built; derivatives name the image that made them.
ARG VERSION=unknown
ARG VARIANT=cpu
ARG REVISION=unknown
ENV TLSEG_CONTAINER=docker:tlseg:${VERSION}
LABEL org.opencontainers.image.title="tlseg" \
      org.opencontainers.image.description="A BIDS App that labels the structures of the brain in any T1w or T2w scan (${VARIANT})" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.version="${VERSION}"

# Nobody in particular, and not root; --user makes the outputs yours.
USER 1000:1000
# -I: no PYTHONPATH and no user site-packages of the host reach into the image.
ENTRYPOINT ["/opt/venv/bin/python", "-I", "/opt/tlseg/bids_app_entry.py"]
