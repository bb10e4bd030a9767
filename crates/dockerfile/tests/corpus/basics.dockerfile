# syntax=docker/dockerfile:1
# check=skip=JSONArgsRecommended;error=false

# VERSION is what to build
ARG VERSION=1.2.3 BASE="debian:${VERSION:-12}"
FROM --platform=$BUILDPLATFORM ${BASE} AS build
ENV A=1 B="two words" C=three\ words D='$A' E=${A:+$B}
ENV legacy form of the value
LABEL org.example.title="a \"quoted\" title" short=x
WORKDIR /src
COPY --from=tools --chown=1000:1000 --chmod=u=rwX,go=rX --link --exclude=*.md --exclude='a b' --parents ./a ./b* /dst/
ADD --checksum=sha256:aaaa --keep-git-dir=true --unpack=false https://example.com/x.tar.gz /
COPY ["with blank", "/there it is/"]
RUN apt-get update && \
    # a comment between

    apt-get install -y \
      curl
RUN ["/bin/echo", "hi\tthere"]
RUN --mount=type=cache,target=/root/.cache,id=$A,sharing=locked --mount=type=secret,id=tok,env=TOKEN \
    --network=none --security=sandbox make ${VERSION}
USER nobody:nogroup
EXPOSE 8080/tcp 53/udp 9000-9010
VOLUME /data ["/x"]
VOLUME ["/a", "/b c"]
STOPSIGNAL SIGTERM
SHELL ["/bin/bash", "-c"]
HEALTHCHECK --interval=5m --timeout=3s --start-period=1.5s --retries=3 CMD curl -f http://localhost/ || exit 1
HEALTHCHECK NONE
ONBUILD RUN echo triggered
ONBUILD COPY --from=build /x /y
MAINTAINER Somebody <a@example.com>
CMD echo hello
ENTRYPOINT ["/entry"]
FROM scratch
copy --from=0 / /
