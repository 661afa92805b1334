# pcenet on a CPU: docker build -t pcenet . && docker run --rm -v "$PWD:/data" pcenet train --data pictures
FROM python:3.11-slim
# The compiler makes the kernels once, here.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/pcenet
COPY . .
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir ".[all]" \
    && useradd --create-home pce
USER pce
RUN python -m pcenet.ops
WORKDIR /data
ENTRYPOINT ["pcenet"]
