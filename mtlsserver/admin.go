package mtlsserver

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"

	"github.com/danielepagano/lbproxy"
	"github.com/danielepagano/lbproxy/mtlsserver/admin"
)

type userApp struct{ user, app string }

// admin checks Config.Admin and returns the token. listens maps the addresses of apps to their
// keys.
func (r *report) admin(listens map[string]string) (token string) {
	a := r.config.Admin
	switch {
	case a == nil && r.config.AdminAnywhere:
		r.add("adminAnywhere", "there is no admin: add it, or remove this")
		return ""
	case a == nil:
		return ""
	case a.Listen == "" && a.Socket == "":
		r.add("admin", "it listens nowhere: set listen or socket, or remove it")
		return ""
	}
	for _, at := range r.config.adminListens() {
		errs := at.Check()
		if at.Anywhere = true; len(errs) > 0 && len(at.Check()) == 0 {
			r.add("admin.listen", "%q: not loopback, so others may see who is connected: "+
				"use 127.0.0.1, or set adminAnywhere for health and metrics alone", at.Addr)
			continue
		}
		for _, err := range errs {
			r.add("admin."+err.Field, "%v", err.Err)
		}
	}
	if a.Listen != "" && portOf(a.Listen) != 0 {
		r.unique(listens, "admin.listen", a.Listen)
	}
	for i, host := range a.Hosts {
		if host == "" || strings.ContainsAny(host, ":/ ") {
			r.add(fmt.Sprintf("admin.hosts[%d]", i), "%q: want a name without port", host)
		}
	}
	if a.Token != "" || r.config.doc.Has("admin.token") {
		text := r.file("admin.token", a.Token, true)
		if token = strings.TrimSpace(string(text)); text != nil && len(token) < 16 {
			r.add("admin.token", "%q: only %d characters: make one of 16 or more, "+
				"such as by openssl rand -hex 16", a.Token, len(token))
		}
	}
	return token
}

// adminListens returns the TCP address and the socket of c.Admin, one Listen each.
func (c *Config) adminListens() (all []admin.Listen) {
	if c.Admin == nil {
		return nil
	}
	if c.Admin.Listen != "" {
		all = append(all, admin.Listen{Addr: c.Admin.Listen, Anywhere: c.AdminAnywhere})
	}
	if path := c.Admin.Socket; path != "" {
		if !filepath.IsAbs(path) {
			path = filepath.Join(c.dir, path)
		}
		all = append(all, admin.Listen{Socket: path})
	}
	return all
}

// adminsFor returns the admin servers for r's Config. It reuses those in old at the same place. The
// caller closes the new ones, even after an error.
func (s *Server) adminsFor(
	r *report, old map[admin.Listen]*admin.Server,
) (map[admin.Listen]*admin.Server, error) {
	admins := map[admin.Listen]*admin.Server{}
	for _, at := range r.config.adminListens() {
		place := admin.Listen{Addr: at.Addr, Socket: at.Socket} // without Anywhere: it may change
		if a := old[place]; a != nil {
			admins[place] = a
			continue
		}
		a, err := admin.Serve(at, http.HandlerFunc(s.serveAdmin))
		if wrong, ok := errors.AsType[*admin.ListenError](err); ok {
			r.add("admin."+wrong.Field, "%v", wrong.Err)
			return admins, r.err()
		}
		admins[place] = a
	}
	return admins, nil
}

// closeAdmins closes the servers in admins that are not in kept.
func closeAdmins(admins, kept map[admin.Listen]*admin.Server) {
	for at, a := range admins {
		if a != kept[at] {
			a.Close()
		}
	}
}

func (s *Server) serveAdmin(w http.ResponseWriter, r *http.Request) {
	if h := s.current.Load().admin; h != nil {
		h.ServeHTTP(w, r)
		return
	}
	http.Error(w, "not started yet", http.StatusServiceUnavailable)
}

// adminHandler returns the handler for the Admin of a snapshot's Config; nil if that is nil.
func (s *Server) adminHandler(snap *snapshot) http.Handler {
	if snap.config.Admin == nil {
		return nil
	}
	opts := &admin.Options{
		Hosts: snap.config.Admin.Hosts, Token: snap.adminToken, Recorder: &s.recorder, Logger: s.log,
		Info: s.adminInfo, Drain: s.drainUpstream,
	}
	if s.onReload != nil {
		opts.Reload = func() (any, error) {
			select { // until then, New may not have returned
			case <-s.started.Done():
			case <-s.closing.Done():
			}
			return s.onReload()
		}
	}
	return admin.Handler(s.currentApps, opts)
}

// AdminAddr returns the address that the server listens on for Config.Admin.Listen, or nil if there
// is none.
func (s *Server) AdminAddr() net.Addr {
	for _, a := range s.current.Load().admins {
		if a.Addr() != nil {
			return a.Addr()
		}
	}
	return nil
}

// currentApps returns the apps in the order of the configuration.
func (s *Server) currentApps() (apps []*lbproxy.LBProxyApp) {
	snap := s.current.Load()
	for _, conf := range snap.config.Apps {
		apps = append(apps, snap.apps[conf.ID].proxy.app)
	}
	return apps
}

func (s *Server) sampleForAdmins() {
	if s.current.Load().admin != nil {
		s.recorder.Sample(s.currentApps())
	}
}

// adminInfo describes the server apart from its apps.
func (s *Server) adminInfo() (info admin.Info) {
	if s.started.Err() == nil {
		info.NotReady = "not running yet"
	} else if s.closing.Err() != nil {
		info.NotReady = "draining"
	}
	if s.sections != nil {
		info.Sections = s.sections()
	}
	info.Refused = map[string]uint64{}
	s.liveMu.Lock()
	for reason, n := range s.denied {
		info.Refused[string(reason)] = n
	}
	open := maps.Clone(s.open)
	s.liveMu.Unlock()
	for at, n := range open {
		info.Users = append(info.Users, admin.User{Name: at.user, App: at.app, Open: n})
	}
	slices.SortFunc(info.Users, func(a, b admin.User) int {
		return cmp.Or(cmp.Compare(b.Open, a.Open),
			cmp.Compare(a.Name, b.Name), cmp.Compare(a.App, b.App))
	})
	for _, c := range s.Certificates() {
		info.Certificates = append(info.Certificates, admin.Certificate{
			Key: c.Key, File: c.File, Subject: c.Subject, NotAfter: c.NotAfter,
		})
	}
	return info
}

// drainUpstream drains an upstream, or ends its drain, for an administrator. The change lasts until
// it is undone, the configuration agrees with it, the upstream is removed, or the process ends.
func (s *Server) drainUpstream(app, addr string, drain bool) error {
	s.reloading.Lock()
	defer s.reloading.Unlock()
	a, i := s.current.Load().upstream(app, addr)
	if i < 0 {
		return admin.ErrNotFound
	}
	a.upstreams[i].Drain = drain
	s.mu.Lock()
	defer s.mu.Unlock()
	s.setUpstreams(a)
	return nil
}
