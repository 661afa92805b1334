# pcenet on a CPU: docker build -t pcenet .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" pcenet train --data pictures
FROM python:3.11-slim
# The compiler makes the kernels once, here.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/pcenet
COPY . .
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir ".[all]"
# Whoever the container runs as finds the kernels, and a place for other caches.
ENV XDG_CACHE_HOME=/var/cache/pcenet HOME=/tmp
RUN python -m pcenet.ops && chmod -R a+rwX /var/cache/pcenet
WORKDIR /data
ENTRYPOINT ["pcenet"]
