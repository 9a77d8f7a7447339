package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode"

	"github.com/danielepagano/lbproxy/mtlsserver"
)

// An asker is a client of package admin's API in a running server.
type asker struct {
	config        string
	network, addr string // of the server's admin
	token         string // permits changes by TCP
}

// askerOf returns an asker for the server that runs with a configuration. It reads only the admin
// in the file, so that it can ask even if the rest of the file has problems.
func askerOf(config string) (*asker, error) {
	text, err := os.ReadFile(config)
	if err != nil {
		return nil, err
	}
	var c struct{ Admin *mtlsserver.Admin }
	if err := json.Unmarshal(text, &c); err != nil {
		return nil, fmt.Errorf("%s: %w: mtlsserver check -config %[1]s says where", config, err)
	}
	a := &asker{config: config}
	switch {
	case c.Admin == nil || c.Admin.Socket == "" && c.Admin.Listen == "":
		return nil, fmt.Errorf(`%s: there is no admin: add "admin": {"socket": "admin.sock"}, `+
			"then send the server SIGHUP", config)
	case c.Admin.Socket != "":
		a.network, a.addr = "unix", within(filepath.Dir(config), c.Admin.Socket)
		return a, nil
	}
	a.network, a.addr = "tcp", c.Admin.Listen
	if c.Admin.Token != "" {
		token, err := os.ReadFile(within(filepath.Dir(config), c.Admin.Token))
		if err != nil {
			return nil, err
		}
		a.token = strings.TrimSpace(string(token))
	}
	return a, nil
}

// A refusal is a server's answer to a request that it rejects.
type refusal struct {
	code int
	text string
}

func (r *refusal) Error() string { return fmt.Sprintf("the server answers %d: %s", r.code, r.text) }

// ask sends a request and decodes the answer into v. The error is a *refusal if the server rejects
// the request.
func (a *asker) ask(method, path string, v any) error {
	// The answer to a reload comes after the reload; the server gives up after a minute.
	client := http.Client{Timeout: 70 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, a.network, a.addr)
		},
	}}
	request, err := http.NewRequest(method, "http://localhost"+path, nil)
	if err != nil {
		return err
	}
	if a.token != "" {
		request.Header.Set("Authorization", "Bearer "+a.token)
	}
	answer, err := client.Do(request)
	if err != nil {
		return a.explain(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(io.LimitReader(answer.Body, 256<<20))
	switch {
	case err != nil:
	case answer.StatusCode != http.StatusOK:
		var said struct{ Error string }
		if json.Unmarshal(text, &said) != nil {
			said.Error = strings.TrimSpace(string(text))
		}
		return &refusal{answer.StatusCode, said.Error}
	default:
		err = json.Unmarshal(text, v)
	}
	if err != nil {
		return fmt.Errorf("%s: cannot read the answer from %s: %w: "+
			"is it an mtlsserver of this version?", a.config, a.addr, err)
	}
	return nil
}

// explain adds a remedy to the error of a connection attempt.
func (a *asker) explain(err error) error {
	remedy := "start it, or send it SIGHUP if it runs but does not have this admin yet"
	if errors.Is(err, fs.ErrPermission) {
		remedy = "run this as the server's user, or as root"
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err
	}
	return fmt.Errorf("%s: no server answers at %s: %w: %s", a.config, a.addr, err, remedy)
}

// printable replaces unprintable characters, because a peer may have chosen part of the text, and
// control characters act upon a terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, text)
}

// reload asks the running server to reload, waits for the answer, and prints the changes.
func reload(config string, stdout, stderr io.Writer) error {
	a, err := askerOf(config)
	if err != nil {
		return err
	}
	if a.network == "tcp" && a.token == "" {
		return fmt.Errorf("%s: admin.listen alone permits no changes: "+
			"add admin.socket or admin.token, or use SIGHUP", config)
	}
	var changes mtlsserver.Changes
	err = a.ask(http.MethodPost, "/api/reload", &changes)
	if no, ok := errors.AsType[*refusal](err); ok && no.code == http.StatusUnprocessableEntity {
		for problem := range strings.SplitSeq(no.text, "\n") {
			fmt.Fprintln(stderr, printable(problem))
		}
		return errReported
	}
	if err != nil {
		return errors.New(printable(err.Error()))
	}
	rows := [][]string{}
	for _, part := range []struct {
		what   string
		change mtlsserver.Change
	}{
		{"users", changes.Users}, {"apps", changes.Apps}, {"upstreams", changes.Upstreams},
		{"certificates", changes.Certificates},
	} {
		if text := part.change.String(); text != "" {
			rows = append(rows, []string{"  " + part.what, printable(text)})
		}
	}
	if len(rows) == 0 {
		rows = [][]string{{"  nothing has changed"}}
	}
	fmt.Fprintf(stdout, "Reloaded, and ended %s.\n", count(changes.Ended, "connection"))
	printTable(stdout, rows)
	return nil
}
