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

// An asker asks the server that runs with a configuration, as package admin has it.
type asker struct {
	config        string
	network, addr string // where it is asked
	token         string // permits changes by TCP
}

// askerOf reads of a configuration only its admin: a server can be asked, and say what is wrong,
// whatever else the file has in it by now.
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
		return nil, fmt.Errorf(`%s: it has no admin to ask: add "admin": {"socket": "admin.sock"}, `+
			"and have the server reload by SIGHUP", config)
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

// A refusal is what a server answers when it does not do what it was asked for.
type refusal struct {
	code int
	text string
}

func (r *refusal) Error() string { return fmt.Sprintf("the server answers %d: %s", r.code, r.text) }

// ask sends a request and decodes the answer into v. What the server answers in place of that is a
// *refusal.
func (a *asker) ask(method, path string, v any) error {
	// A reload is answered when it is done; the server gives up after a minute.
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
		return fmt.Errorf("%s: the answer from %s cannot be read: %w: "+
			"is it an mtlsserver of this version?", a.config, a.addr, err)
	}
	return nil
}

// explain says what to do when no server answers.
func (a *asker) explain(err error) error {
	remedy := "start it, or if it runs without this admin yet, have it reload by SIGHUP"
	if errors.Is(err, fs.ErrPermission) {
		remedy = "run this as the user that the server has, or as root"
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err
	}
	return fmt.Errorf("%s: no server answers at %s: %w: %s", a.config, a.addr, err, remedy)
}

// printable is a text without what would act upon a terminal: peers may have had a word in it.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, text)
}

// reload has the running server reload, waits until it has, and prints what has changed.
func reload(config string, stdout, stderr io.Writer) error {
	a, err := askerOf(config)
	if err != nil {
		return err
	}
	if a.network == "tcp" && a.token == "" {
		return fmt.Errorf("%s: by admin.listen alone nothing can be changed: "+
			"add admin.socket or admin.token, or use SIGHUP", config)
	}
	var changes mtlsserver.Changes
	err = a.ask(http.MethodPost, "/api/reload", &changes)
	if no, ok := errors.AsType[*refusal](err); ok && no.code == http.StatusUnprocessableEntity {
		for problem := range strings.SplitSeq(no.text, "\n") {
			fmt.Fprintln(stderr, printable(problem))
		}
		return errSaid
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
	fmt.Fprintf(stdout, "Reloaded, and ended %d connections.\n", changes.Ended)
	printTable(stdout, rows)
	return nil
}
