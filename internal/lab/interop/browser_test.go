//go:build linux

package interop

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// A tab is one of Chromium's, driven by the DevTools protocol: messages of JSON on two pipes, each
// with a zero byte after it.
type tab struct {
	t       *testing.T
	in      *os.File
	session string
	ended   chan struct{} // there are no more answers

	mu         sync.Mutex
	calls      int
	waiting    map[int]chan message
	complaints []string // errors and warnings of the console, violations of the page's policy included
}

// A message is an answer if it has an ID, else an event.
type message struct {
	ID     int             `json:"id"`
	Method string          `json:"method"`
	Params json.RawMessage `json:"params"`
	Result json.RawMessage `json:"result"`
	Error  *struct {
		Message string `json:"message"`
	} `json:"error"`
}

// newTab starts a headless Chromium, which ends with the test.
func newTab(t *testing.T) *tab {
	t.Helper()
	program := need(t, "chromium", "chromium")
	theirIn, in, err := os.Pipe()
	proxytest.Must(t, err)
	out, theirOut, err := os.Pipe()
	proxytest.Must(t, err)
	b := &tab{t: t, in: in, ended: make(chan struct{}), waiting: map[int]chan message{}}
	t.Cleanup(func() { // after that of start, which ends Chromium
		in.Close()
		<-b.ended
		out.Close()
	})
	cmd := exec.Command(program, "--headless=new", "--no-sandbox",
		"--disable-gpu", "--disable-background-networking", "--hide-scrollbars",
		"--user-data-dir="+folder(t), "--remote-debugging-pipe", "about:blank")
	cmd.ExtraFiles = []*os.File{theirIn, theirOut} // 3 and 4
	start(t, cmd)
	theirIn.Close()
	theirOut.Close()
	go b.read(out)

	var target struct{ TargetID, SessionID string }
	b.call("Target.createTarget", object{"url": "about:blank"}, &target)
	b.call("Target.attachToTarget", object{"targetId": target.TargetID, "flatten": true}, &target)
	b.session = target.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log"} {
		b.call(domain+".enable", object{}, nil)
	}
	return b
}

func (b *tab) read(out *os.File) {
	defer close(b.ended)
	for r := bufio.NewReader(out); ; {
		text, err := r.ReadBytes(0)
		if err != nil {
			return
		}
		var m message
		if err := json.Unmarshal(text[:len(text)-1], &m); err != nil {
			b.complain(err.Error())
		}
		b.mu.Lock()
		answered := b.waiting[m.ID]
		delete(b.waiting, m.ID)
		b.mu.Unlock()
		switch {
		case answered != nil:
			answered <- m
		case m.Method == "Runtime.exceptionThrown", m.Method == "Log.entryAdded",
			m.Method == "Runtime.consoleAPICalled":
			b.complain(string(m.Params))
		}
	}
}

func (b *tab) complain(what string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.complaints = append(b.complaints, what)
}

// takeComplaints returns what came since the last call.
func (b *tab) takeComplaints() (all []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	all, b.complaints = b.complaints, nil
	return all
}

// call calls a method and stores what it answers in result, unless that is nil.
func (b *tab) call(method string, params object, result any) {
	b.t.Helper()
	answered := make(chan message, 1)
	b.mu.Lock()
	b.calls++
	id := b.calls
	b.waiting[id] = answered
	b.mu.Unlock()
	request := object{"id": id, "method": method, "params": params}
	if b.session != "" {
		request["sessionId"] = b.session
	}
	text, err := json.Marshal(request)
	proxytest.Must(b.t, err)
	_, err = b.in.Write(append(text, 0))
	proxytest.Must(b.t, err)
	m := proxytest.Receive(b.t, "Chromium's answer to "+method, answered)
	if m.Error != nil {
		b.t.Fatalf("%s: %s", method, m.Error.Message)
	}
	if result != nil {
		proxytest.Must(b.t, json.Unmarshal(m.Result, result))
	}
}

// open opens a page, and returns when it is there.
func (b *tab) open(url string) {
	b.t.Helper()
	var opened struct{ ErrorText string }
	b.call("Page.navigate", object{"url": url}, &opened)
	if opened.ErrorText != "" {
		b.t.Fatalf("%s: %s", url, opened.ErrorText)
	}
	b.await("document.readyState === 'complete' && location.href === " + fmt.Sprintf("%q", url))
}

// eval stores the value of an expression of JavaScript in result.
func (b *tab) eval(expression string, result any) {
	b.t.Helper()
	var answer struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails json.RawMessage
	}
	b.call("Runtime.evaluate", object{
		"expression": expression, "returnByValue": true, "awaitPromise": true,
	}, &answer)
	if answer.ExceptionDetails != nil {
		b.t.Fatalf("%s: %s", expression, answer.ExceptionDetails)
	}
	proxytest.Must(b.t, json.Unmarshal(answer.Result.Value, result))
}

// await waits until a condition in JavaScript holds.
func (b *tab) await(condition string) {
	b.t.Helper()
	proxytest.Eventually(b.t, condition, func() (ok bool) {
		b.eval("!!("+condition+")", &ok)
		return ok
	})
}

// press presses a key that has no text.
func (b *tab) press(key string, code int) {
	b.t.Helper()
	for _, kind := range []string{"rawKeyDown", "keyUp"} {
		b.call("Input.dispatchKeyEvent", object{
			"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code,
		}, nil)
	}
}

// size makes the window so wide and high.
func (b *tab) size(width, height int) {
	b.t.Helper()
	b.call("Emulation.setDeviceMetricsOverride", object{
		"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600,
	}, nil)
}

func (b *tab) dark(on bool) {
	b.t.Helper()
	scheme := "light"
	if on {
		scheme = "dark"
	}
	b.call("Emulation.setEmulatedMedia", object{
		"features": []object{{"name": "prefers-color-scheme", "value": scheme}},
	}, nil)
}

// screenshot returns the whole page as a PNG. A copy is kept in the folder that the environment
// names, for people to look at.
func (b *tab) screenshot(name string) []byte {
	b.t.Helper()
	var shot struct{ Data string }
	b.call("Page.captureScreenshot", object{"captureBeyondViewport": true}, &shot)
	png, err := base64.StdEncoding.DecodeString(shot.Data)
	proxytest.Must(b.t, err)
	if dir := os.Getenv("LBPROXY_SCREENSHOTS"); dir != "" {
		name = strings.NewReplacer("/", "-", " ", "-", ",", "").Replace(name)
		write(b.t, dir, name+".png", string(png))
	}
	return png
}
