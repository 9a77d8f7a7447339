# An image of mtlsserver with nothing else in it but the system's roots, for upstreams with public
# certificates.
#
#   docker build -t mtlsserver .
#   docker run -v ./lb:/etc/mtlsserver -p 9443:9443 mtlsserver
#
# /etc/mtlsserver and its files must be user 65532's, as the admin's socket is made there; without
# an admin the folder may be read-only. An app's listen must not be a loopback address: use ":9443".
# The server is process 1: SIGTERM (docker stop -t 45) begins a drain, SIGHUP (docker kill -s HUP) a
# reload. It starts no process, so there is none to wait for.
FROM golang:1.26 AS build
WORKDIR /src
COPY . .
RUN CGO_ENABLED=0 go build -trimpath -o /mtlsserver ./mtlsserver/cmd/mtlsserver

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /mtlsserver /mtlsserver
USER 65532:65532
ENTRYPOINT ["/mtlsserver"]
CMD ["run", "-config", "/etc/mtlsserver/config.json"]
