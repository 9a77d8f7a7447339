package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"
)

// baselineArg makes a process of this program the baseline.
const baselineArg = "io.Copy"

// baseline is the plainest proxy in Go: two goroutines of io.Copy for each connection, upstreams
// in turn, no limits, no timeouts. Its arguments are the address to listen on, the files for mutual
// TLS (or "" three times), and the upstreams. It returns only if it cannot start.
func baseline(args []string) error {
	listen, cert, key, ca, upstreams := args[0], args[1], args[2], args[3], args[4:]
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return err
		}
		pool, err := certPool(ca)
		if err != nil {
			return err
		}
		l = tls.NewListener(l, &tls.Config{
			Certificates: []tls.Certificate{pair},
			ClientCAs:    pool, ClientAuth: tls.RequireAndVerifyClientCert,
			MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true,
		})
	}
	var next atomic.Uint64
	for {
		client, err := l.Accept()
		if err != nil {
			time.Sleep(time.Millisecond)
			continue
		}
		go copyBoth(client, upstreams[next.Add(1)%uint64(len(upstreams))])
	}
}

func copyBoth(client net.Conn, upstream string) {
	defer client.Close()
	server, err := net.DialTimeout("tcp", upstream, patience)
	if err != nil {
		return
	}
	defer server.Close()
	uploaded := make(chan struct{})
	go func() {
		defer close(uploaded)
		copyOne(server, client)
	}()
	copyOne(client, server)
	<-uploaded
}

func copyOne(dst, src net.Conn) {
	io.Copy(dst, src)
	dst.(interface{ CloseWrite() error }).CloseWrite()
}

func certPool(file string) (*x509.CertPool, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s: want a certificate in PEM", file)
	}
	return pool, nil
}
