FROM a
ARG A=${B:-c} D=${E-f} G=${H:+i} J=${K+l} M=${N:?o} P=${Q?r}
ENV S=${A#*/} T=${A##*/} U=${A%.*} V=${A%%.*} W=${A/a/b} X=${A//a/$B} Y=${A#\*} Z="${A:-"x y"}"
USER ${U:-${V:-${W:-nobody}}}
EXPOSE 80${X:-80} ${PORTS}
WORKDIR /$A/${B}/\$C/'$D'/"$E"
LABEL a=$$ b=$1 c=${#} d=$@
VOLUME $A ${B}
STOPSIGNAL ${S:-9}
RUN --mount=type=$T,target=/x/${Y},from=a --device=vendor.com/x=y,required echo $A
COPY ${A:-"b c"} $D*/ /x/
