# Two images of one application, both run as an ordinary user on a read-only file system:
#
#   docker build --target server .    migrate, gateway, flower, producers: no torch
#   docker build .                    the worker: the same, and what holds a model
#
# The worker's torch is the package index's own wheel, which on x86-64 Linux carries CUDA and does without a GPU too.
# For another build of it (a smaller one for CPUs alone, another CUDA), name the index that has it:
#
#   docker build --build-arg TORCH_INDEX_URL=... .
#
# The versions are those of constraints.txt in every case.

ARG PYTHON_VERSION=3.11

# -- the wheel, with migrations and tiny-chat inside --
FROM python:${PYTHON_VERSION}-slim AS wheel
WORKDIR /source
COPY constraints.txt ./
RUN python -m pip install --no-cache-dir --constraint constraints.txt --upgrade pip
COPY . .
RUN python -m pip wheel --no-deps --build-constraint constraints.txt --wheel-dir /wheels .

# -- environments; they are built where they will lie --
FROM python:${PYTHON_VERSION}-slim AS server-environment
COPY constraints.txt /
RUN python -m venv /opt/headrace \
 && /opt/headrace/bin/python -m pip install --no-cache-dir --constraint /constraints.txt --upgrade pip
COPY --from=wheel /wheels /wheels
RUN /opt/headrace/bin/python -m pip install --no-cache-dir --constraint /constraints.txt \
    "$(echo /wheels/*.whl)[flower,gateway]"

FROM server-environment AS worker-environment
ARG TORCH_INDEX_URL=
RUN PIP_EXTRA_INDEX_URL="${TORCH_INDEX_URL}" /opt/headrace/bin/python -m pip install --no-cache-dir \
    --constraint /constraints.txt "$(echo /wheels/*.whl)[flower,gateway,worker]"

# -- what runs --
FROM python:${PYTHON_VERSION}-slim AS runtime
RUN useradd --uid 10001 --create-home headrace \
 && install --directory --owner headrace --group headrace /models
ENV PATH=/opt/headrace/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HEADRACE_HOME=/tmp/headrace \
    HF_HOME=/models
USER 10001:10001
WORKDIR /home/headrace
ENTRYPOINT ["headrace"]
CMD ["--help"]

FROM runtime AS server
COPY --from=server-environment /opt/headrace /opt/headrace

FROM runtime AS worker
# What the NVIDIA container toolkit mounts; without it these say nothing.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=worker-environment /opt/headrace /opt/headrace
