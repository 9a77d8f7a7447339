package lbproxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/danielepagano/lbproxy/internal/loop"
	"github.com/danielepagano/lbproxy/internal/relay"
)

// loops are the event loops of an app. They start with the first TCP listener or connection.
type loops struct {
	wanted bool // by Options, which allow them
	config relay.Config
	once   sync.Once   // done when they have started, or never will
	group  *loop.Group // set in once; nil: there are none
}

var newLoops = loop.NewGroup // tests make it fail

// start returns the loops, or nil if there are none. The error says why, once.
func (l *loops) start() (g *loop.Group, err error) {
	l.once.Do(func() { l.group, err = newLoops(l.config, runtime.GOMAXPROCS(0)) })
	return l.group, err
}

// close is called once, when no session is left.
func (l *loops) close() {
	l.once.Do(func() {}) // they no longer start
	if l.group != nil {
		l.group.Close()
	}
}

// A loopListener accepts on a loop. Its own Accept returns the connections that the loop cannot
// take.
type loopListener struct {
	*net.TCPListener
	bare *loop.Listener
}

// A loopConn is what it accepts: a descriptor, which Serve owns.
type loopConn struct {
	heldConn
	accepted loop.Accepted
}

// listenForLoops returns a listener in the place of l if its connections may be served by loops,
// else l.
func (a *LBProxyApp) listenForLoops(l net.Listener, admit AdmitFunc) net.Listener {
	tcp, ok := l.(*net.TCPListener)
	if !ok { // but its connections may move to loops
		return l
	}
	g := a.startLoops()
	if g == nil || admit != nil {
		return l
	}
	bare, err := g.NewListener(tcp, a.takeOnLoop)
	if err != nil {
		a.logNoLoops(err)
		return l
	}
	return &loopListener{tcp, bare}
}

// startLoops returns the app's loops, or nil if there are none.
func (a *LBProxyApp) startLoops() *loop.Group {
	if !a.loops.wanted {
		return nil
	}
	g, err := a.loops.start()
	a.logNoLoops(err)
	return g
}

func (a *LBProxyApp) logNoLoops(err error) {
	if err != nil && !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, net.ErrClosed) {
		a.log(slog.LevelWarn, "lbproxy: no event loops: connections run on goroutines",
			slog.String("err", err.Error()))
	}
}

// takeOnLoop serves what a loop has accepted, on the loop, or returns false if there is no slot.
func (a *LBProxyApp) takeOnLoop(c loop.Accepted) bool {
	if a.slots != nil {
		select {
		case a.slots <- struct{}{}:
		default:
			return false
		}
	}
	if !a.startOnLoop(c) {
		loop.Reset(c.FD)
	}
	return true
}

func (l *loopListener) Accept() (net.Conn, error) {
	c, err := l.bare.Accept()
	if err != nil {
		return nil, err
	}
	return &loopConn{accepted: c}, nil
}

func (l *loopListener) Close() error {
	err := l.TCPListener.Close()
	l.bare.Close()
	return err
}

// startOnLoop serves c, for which there is a slot, on a loop. It returns false if the app is
// stopping; then c is still the caller's, and the slot is free.
func (a *LBProxyApp) startOnLoop(c loop.Accepted) bool {
	s := a.begin(context.Background(), &Conn{Client: &heldConn{c.Local, c.Remote}})
	s.accepted, s.client, s.state = true, s.raw, ConnDialing
	s.loop = loop.NewSession(c.FD, (*onLoop)(s))
	if !a.enter(s) {
		a.freeSlot()
		return false
	}
	c.Start(s.loop) // if it has been aborted meanwhile, Next ends it
	return true
}

// moveToLoop gives s, which Serve has accepted and admit has let in, to a loop. At most chunk bytes
// move before the RateLimit is asked. It returns false if s has to stay: its client is not plain
// TCP, or a loop would have to call what others wrote.
func (s *session) moveToLoop(chunk int) bool {
	c := s.conn
	tcp, ok := s.client.(*net.TCPConn)
	if !ok || !isSame(s.raw, tcp) || !isPlain(c.ClientAddr) || !isPlain(c.ServerAddr) {
		return false
	}
	g := s.app.startLoops()
	// A session that was aborted meanwhile has not asked to open.
	if g == nil || c.RateLimit != nil && !(s.opened && isOwn(c.RateLimit)) {
		return false
	}
	fd, err := loop.Duplicate(tcp)
	if err != nil {
		return false
	}
	on := loop.NewSession(fd, (*onLoop)(s))
	if c.RateLimit != nil {
		on.Limit(chunk)
	}
	c.mu.Lock()
	aborted := c.cause != nil
	if !aborted {
		s.loop, s.raw, s.client = on, c.Client, c.Client // the stub
	}
	c.mu.Unlock()
	if aborted {
		loop.Reset(fd)
		return false
	}
	tcp.Close() // the loop has the duplicate
	g.Start(on)
	return true
}

// isPlain reports whether a, which may be nil, has methods of net's own, which do not block.
func isPlain(a net.Addr) bool {
	_, ok := a.(*net.TCPAddr)
	return a == nil || ok
}

// isOwn reports whether m, which has allowed a session to open, and all that it asks are this
// package's own managers, which do not block.
func isOwn(m RateLimitManager) bool {
	switch m := m.(type) {
	case *TokenBucket, *OpenLimit, *Bandwidth:
		return true
	case all:
		return !slices.ContainsFunc(m, func(m RateLimitManager) bool { return !isOwn(m) })
	case *clientLimit:
		return isOwn(m.known.limit)
	}
	return false
}

// onLoop is a session while it is on a loop: its loop.Handler.
type onLoop session

// dialing is what a session on a loop knows of the upstream that it dials.
type dialing struct {
	resolving sync.WaitGroup   // the goroutine that sets addrs and err
	addrs     []netip.AddrPort // to be dialed, one after the other
	err       error            // the first that was met
	late      time.Time        // when DialTimeout ends
	unwatch   func() bool      // ends the wait for the upstream to be found down; nil: none
}

// Next implements loop.Handler.
func (o *onLoop) Next(failed error) (loop.Target, error) {
	s := (*session)(o)
	if s.finding == nil {
		s.finding = new(finding)
	}
	f := s.finding
	f.endWatch()
	if failed != nil {
		f.dialFailed(failed)
	}
	if f.pick.u != nil && len(f.addrs) == 0 {
		if !s.next(f, f.err) {
			return loop.Target{}, o.notFound(f)
		}
	}
	if f.pick.u == nil {
		if !s.choose(f) {
			return loop.Target{}, o.notFound(f)
		}
		if err := o.resolve(f); err != nil {
			return loop.Target{}, err
		}
	}
	if lost := f.pick.lost; lost != nil {
		dial := s.loop.Dials() + 1
		f.unwatch = context.AfterFunc(lost, func() { s.loop.CancelDial(dial, context.Canceled) })
	}
	return loop.Target{Addr: f.addrs[0], Timeout: f.timeout()}, nil
}

// notFound ends the search f without an upstream. A session with an OnRefused leaves its loop for
// that, without a pick.
func (o *onLoop) notFound(f *finding) error {
	if o.conn.OnRefused != nil {
		return loop.ErrLeave
	}
	return o.conn.decide(f.ending())
}

// resolve finds the addresses of a new pick. If there is a name to look up it returns ErrWait.
func (o *onLoop) resolve(f *finding) error {
	s, conf := (*session)(o), f.pick.conf
	f.addrs, f.err, f.late = nil, nil, time.Now().Add(s.app.opts.DialTimeout)
	if conf.TLS != nil {
		return loop.ErrLeave
	}
	addr, err := netip.ParseAddrPort(conf.Addr)
	switch {
	case err != nil:
		f.resolving.Go(func() { s.lookup(f) })
		return loop.ErrWait
	case addr.Addr().Zone() != "":
		return loop.ErrLeave
	}
	f.addrs = []netip.AddrPort{addr}
	return nil
}

// lookup resolves the name of f's pick, and then resumes the session.
func (s *session) lookup(f *finding) {
	ctx, cancel := s.dialContext()
	defer cancel()
	if f.pick.lost != nil {
		defer context.AfterFunc(f.pick.lost, cancel)()
	}
	f.addrs, f.err = lookup(ctx, f.pick.conf.Addr)
	s.loop.Resume()
}

func lookup(ctx context.Context, addr string) (addrs []netip.AddrPort, err error) {
	defer func() {
		if err != nil {
			err = &net.OpError{Op: "dial", Net: "tcp", Err: err}
		}
	}()
	host, service, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	port, err := net.DefaultResolver.LookupPort(ctx, "tcp", service)
	if err != nil {
		return nil, err
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	for _, ip := range ips {
		addrs = append(addrs, netip.AddrPortFrom(ip.Unmap().WithZone(""), uint16(port)))
	}
	return addrs, err
}

// dialFailed notes that the dial of the first address has failed.
func (f *finding) dialFailed(err error) {
	if f.err == nil {
		addr := net.TCPAddrFromAddrPort(f.addrs[0])
		f.err = &net.OpError{Op: "dial", Net: "tcp", Addr: addr, Err: err}
	}
	f.addrs = f.addrs[1:]
	if !time.Now().Before(f.late) || f.pick.lost != nil && f.pick.lost.Err() != nil {
		f.addrs = nil
	}
}

// timeout is how long the next address may take: its share of the time that is left, but 2 seconds
// if there are as many, as net has it.
func (f *finding) timeout() time.Duration {
	left := time.Until(f.late)
	return max(left/time.Duration(len(f.addrs)), min(left, 2*time.Second))
}

func (f *finding) endWatch() {
	if f.unwatch != nil {
		f.unwatch()
		f.unwatch = nil
	}
}

// Header implements loop.Handler.
func (o *onLoop) Header() []byte {
	version := o.finding.pick.conf.ProxyProtocol
	if version == 0 {
		return nil
	}
	return proxyHeader(version, o.conn)
}

// Connected implements loop.Handler.
func (o *onLoop) Connected() {
	o.finding.endWatch()
	(*session)(o).connected(o.finding)
}

// Moved implements loop.Handler.
func (o *onLoop) Moved(from relay.Side, n int) relay.Verdict {
	return (*session)(o).Moved(from, n)
}

// Leave implements loop.Handler.
func (o *onLoop) Leave(client, server int) { go (*session)(o).goOn(client, server) }

// goOn serves a session that has left its loop, with a server unless that is negative.
func (s *session) goOn(client, server int) {
	defer s.app.logConnPanic()
	e := &ending{EndCanceled, relay.ErrPanicked} // unless the hooks return
	defer func() {
		if e != nil {
			s.giveUp(e)
		}
	}()
	c := relay.NewFileConn(client, s.raw.LocalAddr(), s.raw.RemoteAddr())
	s.raw, s.client = c, c
	if server < 0 {
		if f := s.finding; f.pick.u == nil { // notFound
			e = f.ending()
			return
		}
		e = s.join(0, s.loop.Chunk())
		return
	}
	s.reached = true
	up := relay.NewFileConn(server, nil, nil)
	c.Shut, up.Shut = s.loop.Shut()
	if e = s.startRelay(s.loop.Chunk()); e != nil {
		relay.Reset(up)
		return
	}
	s.relay.Connect(up)
}

// Done implements loop.Handler.
func (o *onLoop) Done(outcome relay.Outcome) {
	s := (*session)(o)
	s.outcome = &outcome
	e, _ := outcome.Err.(*ending)
	foreign := e != nil && e.end == EndCanceled // the log asks for the text of Abort's cause
	hooks := s.app.opts.OnDone != nil || s.conn.OnDone != nil
	if s.finding == nil && s.unlost == nil && !hooks && !foreign {
		s.finishOnLoop() // there is nothing to wait for
	} else {
		go s.finishOnLoop()
	}
}

// finishOnLoop ends a session whose loop has closed it.
func (s *session) finishOnLoop() {
	defer s.app.logConnPanic()
	if s.finding != nil {
		s.stop(s.outcome.Err) // ends the lookup
		s.endFinding()
	}
	s.finish()
}
