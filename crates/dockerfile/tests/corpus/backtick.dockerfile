# escape=`

FROM mcr.example.com/windows AS win
WORKDIR C:\app
RUN dir `
  C:\ `
  && echo done
COPY a`"b "C:\Program Files\"
ENV P="C:\x;${P}" Q=a` b
SHELL ["powershell", "-Command"]
FROM win
FROM other as Second
