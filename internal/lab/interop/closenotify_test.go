//go:build linux

package interop

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/danielepagano/lbproxy/internal/proxytest"
)

// The actions of a client before it leaves.
const (
	idle   = "closes a kept connection that is idle"
	upload = "closes in the middle of an upload"
)

// An outcome is a possible result when a client leaves: the reason in the proxy's log, and the
// upstream's view, "end" or "reset".
type outcome struct{ reasons, upstream string }

var (
	ended = outcome{"done", "end"}
	cut   = outcome{"client-closed", "reset"}
	// In the middle of an upload the proxy may hold data or not, and the client may leave bytes
	// unread, so that its system sends a reset.
	cutShort = outcome{"client-closed client-error", "reset"}
	anyEnd   = outcome{"done client-closed client-error", "end reset"}
)

// Clients differ in sending TLS's close_notify when they leave: Python, Node and a Go program that
// exits do not send it; curl does, and nginx does when it gives up an upload. Without close_notify,
// "required" resets the upstream; "idle" and "optional" pass the end on if no data was in flight.
var closeNotifyTable = []struct {
	client, does             string
	required, idle, optional outcome
}{
	{"Python", idle, cut, ended, ended},
	{"Python", upload, cutShort, anyEnd, anyEnd},
	{"Node", idle, cut, ended, ended},
	{"Node", upload, cutShort, anyEnd, anyEnd},
	{"Go", idle, cut, ended, ended},
	{"Go", upload, cutShort, anyEnd, anyEnd},
	{"nginx", idle, cut, ended, ended},
	{"nginx", upload, anyEnd, anyEnd, anyEnd},
	{"curl", idle, ended, ended, ended},
	{"curl", upload, anyEnd, anyEnd, anyEnd},
}

func TestCloseNotify(t *testing.T) {
	for mode, closeNotify := range []string{"required", "idle", "optional"} {
		t.Run(closeNotify, func(t *testing.T) {
			o := newOrigin(t)
			m := startMTLS(t, closeNotify, o.addr)
			seen := 0 // lines of m's log
			for _, row := range closeNotifyTable {
				t.Run(row.client+" "+row.does, func(t *testing.T) {
					want := []outcome{row.required, row.idle, row.optional}[mode]
					leave(t, m, row.client, row.does)
					var reasons []end
					var upstream []string
					proxytest.Eventually(t, "both sides know of the end", func() bool {
						reasons = parseEnds(t, m.text())
						upstream = append(upstream, o.take()...)
						return len(reasons) > seen && len(upstream) > 0
					})
					for _, e := range reasons[seen:] {
						if !slices.Contains(strings.Fields(want.reasons), e.reason) {
							t.Errorf("the proxy calls the end %q, want %s: %s",
								e.reason, want.reasons, e.detail)
						}
					}
					for _, saw := range upstream {
						if !slices.Contains(strings.Fields(want.upstream), saw) {
							t.Errorf("the upstream sees %q, want %s", saw, want.upstream)
						}
					}
					seen = len(reasons)
				})
				seen = len(parseEnds(t, m.text()))
			}
		})
	}
}

// sentOfUpload is the part of a million bytes that a client has sent when it leaves.
const sentOfUpload = 300_000

// leave makes a client perform an action and leave.
func leave(t *testing.T, m *mtls, client, does string) {
	t.Helper()
	switch client + " " + does {
	case "Python " + idle:
		quiet(t, m.python(t, `
c = http.client.HTTPSConnection('localhost', port, context=context)
c.request('GET', '/1000')
c.getresponse().read()
c.close()`))
	case "Python " + upload:
		quiet(t, m.python(t, fmt.Sprintf(`
c = http.client.HTTPSConnection('localhost', port, context=context)
c.putrequest('POST', '/')
c.putheader('Content-Length', '1000000')
c.endheaders()
c.send(open(%q, 'rb').read(%d))
c.close()`, pattern(t), sentOfUpload)))
	case "Node " + idle:
		quiet(t, m.node(t, `
const agent = new https.Agent({keepAlive: true});
https.get({...options, agent, path: '/1000'}, r => r.on('end', () =>
	setTimeout(() => agent.destroy(), 50)).resume());`))
	case "Node " + upload:
		quiet(t, m.node(t, fmt.Sprintf(`
const body = fs.readFileSync(%q).subarray(0, %d);
const request = https.request({...options, method: 'POST', headers: {'Content-Length': 1000000}});
request.on('error', () => {});
request.write(body, () => request.destroy());`, pattern(t), sentOfUpload)))
	case "Go " + idle:
		c, raw := m.dial(t)
		fmt.Fprint(c, "GET /1000 HTTP/1.1\r\n\r\n")
		readAnswer(t, c, 1000)
		raw.Close()
	case "Go " + upload:
		c, raw := m.dial(t)
		fmt.Fprint(c, "POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
		_, err := proxytest.Pattern(1_000_000).Send(c, sentOfUpload)
		proxytest.Must(t, err)
		raw.Close()
	case "nginx " + idle:
		addr, _, _ := m.nginx(t)
		quiet(t, command(t, need(t, "curl", "curl"), "-sS", "-o", "/dev/null", "http://"+addr+"/1000"))
	case "nginx " + upload:
		addr, _, _ := m.nginx(t)
		giveUp(t, command(t, need(t, "curl", "curl"), "-sS", "--limit-rate", "300k", "-m", "1",
			"-H", "Expect:", "--data-binary", "@"+pattern(t), "http://"+addr+"/"))
	case "curl " + idle:
		quiet(t, m.curl(t, "1000", append(m.withCert(), "-o", "/dev/null")...))
	case "curl " + upload:
		giveUp(t, m.curl(t, "", append(m.withCert(), "--limit-rate", "300k", "-m", "1",
			"-H", "Expect:", "--data-binary", "@"+pattern(t))...))
	default:
		t.Fatalf("%s does not know how it %s", client, does)
	}
}

// pattern returns a file with a million bytes as the origin wants them.
func pattern(t *testing.T) string {
	path, _ := patternFile(t, folder(t), 1_000_000)
	return path
}

// giveUp runs a curl that must end because its time is over.
func giveUp(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	const timedOut = 28
	if out, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != timedOut {
		t.Errorf("curl: %v, %s; want it to give up", err, out)
	}
}

// dial connects as alice. The connection below TLS can be closed without close_notify, as the
// system closes it when a program exits.
func (m *mtls) dial(t *testing.T) (c *tls.Conn, raw *net.TCPConn) {
	t.Helper()
	raw = proxytest.Dial(t, m.addr)
	return m.client(t, raw), raw
}

// client returns alice's side of TLS over raw.
func (m *mtls) client(t *testing.T, raw net.Conn) *tls.Conn {
	t.Helper()
	cert, err := tls.LoadX509KeyPair(m.file("alice.pem"), m.file("alice.key"))
	proxytest.Must(t, err)
	return tls.Client(raw, &tls.Config{
		// This test checks the origin's bytes; others check the server's certificate.
		InsecureSkipVerify: true, Certificates: []tls.Certificate{cert},
	})
}

func readAnswer(t *testing.T, c net.Conn, size int64) {
	t.Helper()
	head := make([]byte, len(answerHead(size)))
	_, err := io.ReadFull(c, head)
	proxytest.Must(t, err)
	if string(head) != answerHead(size) {
		t.Fatalf("the answer begins %q", head)
	}
	got, err := proxytest.Pattern(size).Receive(io.LimitReader(c, size))
	if got != size || err != nil {
		t.Fatalf("%d bytes of %d came, %v", got, size, err)
	}
}

// A client that ends its stream by FIN alone gets the answer that comes after it, unless
// close_notify is required.
func TestAnswerAfterAFINWithoutCloseNotify(t *testing.T) {
	const size = 300_006
	for _, closeNotify := range []string{"required", "idle", "optional"} {
		t.Run(closeNotify, func(t *testing.T) {
			o := newOrigin(t)
			m := startMTLS(t, closeNotify, o.addr)
			c, raw := m.dial(t)
			fmt.Fprintf(c, "GET /%d HTTP/1.0\r\nX-Wait: yes\r\n\r\n", size)
			proxytest.Receive(t, "the request", o.waiting)
			<-time.After(maxDelayedAck)
			raw.CloseWrite()
			if closeNotify != "required" {
				readAnswer(t, c, size)
				m.wantEnds(t, 1, "done")
			} else {
				proxytest.Must(t, proxytest.Cut(c))
				m.wantEnds(t, 1, "client-closed")
			}
		})
	}
}

// maxDelayedAck is how long Linux may leave bytes unacknowledged that the program has read. Until
// then the connection is not idle.
const maxDelayedAck = 250 * time.Millisecond
