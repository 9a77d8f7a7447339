package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A work is one kind of load.
type work struct {
	name    string // in the table: what one operation is
	clients int
	ops     int64 // the clients' counts that make one operation
	client  func(*load) error
	streams int  // additional bulk streams, which do not count
	idle    int  // additional idle connections
	nagle   bool // clients leave TCP_NODELAY off
}

const (
	messageSize = 64
	largeSize   = 4 << 10
	bulkSize    = 256 << 10
	patience    = 5 * time.Second // longer than any step should take: nothing hangs
)

// The first byte of a client's first message tells the upstream what to do.
const (
	answerOnce  = iota // send the message back and close
	answerLarge        // the same with a message of largeSize
	echo               // send back this one and all that follow
	source             // send without end
	sink               // read without end
)

// Clients that make round trips beside bulk, and the time between the messages of each. They do not
// wait for the previous answer: 2,000 messages a second in all.
const (
	pacedClients = 8
	pace         = 4 * time.Millisecond
)

// works are the choices of -work.
var works = map[string][]work{
	"conn": {
		{name: "connection, 32 at once", clients: 32, ops: 1, client: (*load).connect},
		{name: "connection of 4 KiB, 128 at once", clients: 128, ops: 1,
			client: (*load).connectLarge},
	},
	"nagle": {
		{name: "connection, Nagle on, 1 client", clients: 1, ops: 1, client: (*load).connect,
			nagle: true},
	},
	"ping": {
		{name: "round trip, 1 client", clients: 1, ops: 1, client: (*load).ping},
		{name: "round trip, 64 clients", clients: 64, ops: 1, client: (*load).ping},
	},
	"beside": {
		{name: "round trip, 2,000 a second, 1,000 idle beside", clients: pacedClients, ops: 1,
			client: (*load).paced, idle: 1000},
		beside(1), beside(2), beside(8), beside(32),
	},
	"bulk": {
		{name: "MiB down, 1 client", clients: 1, ops: 1 << 20, client: (*load).download},
		{name: "MiB down, 8 clients", clients: 8, ops: 1 << 20, client: (*load).download},
		{name: "MiB up, 8 clients", clients: 8, ops: 1 << 20, client: (*load).upload},
	},
}

func beside(streams int) work {
	return work{
		name:    fmt.Sprintf("round trip, 2,000 a second, %d in bulk beside", streams),
		clients: pacedClients, ops: 1, client: (*load).paced, streams: streams,
	}
}

// A load is clients at work on a proxy.
type load struct {
	dial  func() (net.Conn, error)
	until time.Time
	count atomic.Int64
	took  latencies // of counted operations
	fails
}

// counted counts an operation that was due at a time and is done now.
func (l *load) counted(due time.Time) {
	l.count.Add(1)
	l.took.add(time.Since(due))
}

// fails counts errors and keeps the first.
type fails struct {
	mu    sync.Mutex
	n     int
	first error
}

func (f *fails) add(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n++; f.n == 1 {
		f.first = err
	}
}

// A sample is the result of a load.
type sample struct {
	rate                  float64       // operations a second
	cpu                   time.Duration // of the proxy, for one operation
	p50, p99, p999        time.Duration // of an operation's duration
	resident, descriptors float64       // of the proxy, for one idle connection
	errs                  int
	err                   error // the first
}

var errNothingDone = errors.New("nothing got done")

// measure makes clients do w through p and, once they have started, counts their operations in
// window.
func (p *process) measure(w work, window time.Duration) sample {
	l := &load{dial: p.dial}
	idle := p.hold(context.Background(), w.idle, &l.fails)
	defer closeAll(idle)
	begin, warm := time.Now(), window/4
	l.until = begin.Add(warm + window + 20*time.Millisecond)
	if w.nagle {
		l.dial = p.dialNagle
	}
	var clients sync.WaitGroup
	for range w.streams {
		clients.Go(func() {
			if err := l.stream(source, net.Conn.Read, new(atomic.Int64)); err != nil {
				l.add(err)
			}
		})
	}
	for range w.clients {
		clients.Go(func() {
			if err := w.client(l); err != nil {
				l.add(err)
			}
		})
	}
	time.Sleep(warm)
	pids := family(p.cmd.Process.Pid)
	l.took.reset()
	start, count, cpu := time.Now(), l.count.Load(), cpuTime(pids)
	time.Sleep(time.Until(begin.Add(warm + window)))
	took, cpu := time.Since(start), cpuTime(pids)-cpu
	count = l.count.Load() - count
	s := sample{p50: l.took.quantile(0.5), p99: l.took.quantile(0.99), p999: l.took.quantile(0.999)}
	clients.Wait()
	s.errs, s.err = l.n, l.first
	if n := float64(count) / float64(w.ops); n > 0 {
		s.rate, s.cpu = n/took.Seconds(), time.Duration(float64(cpu)/n)
	} else {
		s.errs, s.err = s.errs+1, cmp.Or(s.err, errNothingDone)
	}
	return s
}

// connect opens connections for one message and its answer each. The upstream closes them.
func (l *load) connect() error      { return l.exchanges(answerOnce) }
func (l *load) connectLarge() error { return l.exchanges(answerLarge) }

func (l *load) exchanges(first byte) error {
	for due := time.Now(); due.Before(l.until); due = time.Now() {
		if err := l.exchange(first); err != nil {
			l.add(err)
			time.Sleep(time.Millisecond)
			continue
		}
		l.counted(due)
	}
	return nil
}

func (l *load) exchange(first byte) error {
	c, err := l.open(first)
	if err != nil {
		return err
	}
	defer c.Close()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		return fmt.Errorf("after the answer: %d bytes and %v, want the end of the stream", n, err)
	}
	return nil
}

// open connects, sends the first message, and reads the answer if one is due.
func (l *load) open(first byte) (net.Conn, error) {
	c, err := l.dial()
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(patience))
	msg := message(first)
	if first == source || first == sink {
		_, err = c.Write(msg)
	} else {
		err = roundTrip(c, msg, make([]byte, len(msg)))
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func message(first byte) []byte {
	size := messageSize
	if first == answerLarge {
		size = largeSize
	}
	msg := bytes.Repeat([]byte{'x'}, size)
	msg[0] = first
	return msg
}

func roundTrip(c net.Conn, msg, answer []byte) error {
	if _, err := c.Write(msg); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, answer); err != nil {
		return err
	}
	if !bytes.Equal(msg, answer) {
		return errors.New("the answer is not what was sent")
	}
	return nil
}

// ping sends messages over one connection, each after the answer to the previous one.
func (l *load) ping() error {
	c, err := l.open(echo)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(l.until.Add(patience))
	msg, answer := message(echo), make([]byte, messageSize)
	for due := time.Now(); due.Before(l.until); due = time.Now() {
		if err := roundTrip(c, msg, answer); err != nil {
			return err
		}
		l.counted(due)
	}
	return nil
}

// paced sends messages over one connection at fixed times, and measures from a message's time to
// its answer, so that the wait behind other messages counts.
func (l *load) paced() error {
	c, err := l.open(echo)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(l.until.Add(patience))
	var reading sync.WaitGroup
	defer reading.Wait()
	begin := time.Now()
	reading.Go(func() {
		answer := make([]byte, messageSize)
		for due := begin; due.Before(l.until); due = due.Add(pace) {
			if _, err := io.ReadFull(c, answer); err != nil {
				l.add(err)
				return
			}
			l.counted(due)
		}
	})
	msg := message(echo)
	for due := begin; due.Before(l.until); due = due.Add(pace) {
		time.Sleep(time.Until(due))
		if _, err := c.Write(msg); err != nil {
			return err
		}
	}
	return nil
}

func (l *load) download() error { return l.stream(source, net.Conn.Read, &l.count) }
func (l *load) upload() error   { return l.stream(sink, net.Conn.Write, &l.count) }

func (l *load) stream(
	first byte, move func(net.Conn, []byte) (int, error), count *atomic.Int64,
) error {
	c, err := l.open(first)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(l.until)
	for b := make([]byte, bulkSize); ; {
		n, err := move(c, b)
		count.Add(int64(n))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// hold opens n connections through p that echo one message each and then rest. It stops after a few
// errors: without descriptors a proxy makes each connection wait. The caller closes them.
func (p *process) hold(ctx context.Context, n int, f *fails) (conns []net.Conn) {
	l := &load{dial: p.dial}
	for len(conns) < n && f.n < 3 && ctx.Err() == nil {
		c, err := l.open(echo)
		if err != nil {
			f.add(err)
			continue
		}
		c.SetDeadline(time.Time{})
		conns = append(conns, c)
	}
	return conns
}

// idle measures the memory and descriptors of n connections at rest.
func (p *process) idle(ctx context.Context, n int, settle time.Duration) sample {
	var f fails
	closeAll(p.hold(ctx, 10, &f)) // so that the cost of the first use does not count
	time.Sleep(settle)
	pids := family(p.cmd.Process.Pid)
	resident, descriptors := memory(pids)
	conns := p.hold(ctx, n, &f)
	defer closeAll(conns)
	time.Sleep(settle)
	r, d := memory(pids)
	each := float64(max(len(conns), 1))
	return sample{resident: (r - resident) / each, descriptors: (d - descriptors) / each, errs: f.n,
		err: f.first}
}

func closeAll(conns []net.Conn) {
	for _, c := range conns {
		c.Close()
	}
}

// answer is the upstreams' part of each connection.
func answer(l net.Listener) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(time.Millisecond)
			continue
		}
		go func() {
			defer c.Close()
			converse(c)
		}()
	}
}

func converse(c net.Conn) {
	msg := make([]byte, messageSize)
	if _, err := io.ReadFull(c, msg); err != nil {
		return
	}
	var err error
	switch msg[0] {
	case answerOnce:
		c.Write(msg)
	case answerLarge:
		msg = slices.Grow(msg, largeSize)[:largeSize]
		if _, err = io.ReadFull(c, msg[messageSize:]); err == nil {
			c.Write(msg)
		}
	case echo:
		for err == nil {
			if _, err = c.Write(msg); err == nil {
				_, err = io.ReadFull(c, msg)
			}
		}
	case source:
		for b := make([]byte, bulkSize); err == nil; {
			_, err = c.Write(b)
		}
	case sink:
		for b := make([]byte, bulkSize); err == nil; {
			_, err = c.Read(b)
		}
	}
}
