package main

import (
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"time"

	"github.com/danielepagano/lbproxy/mtlsserver"
)

// A renewal holds the flags of the command renew.
type renewal struct {
	dir   string
	hosts list // empty: the names in the current certificate
	days  int
}

// renew makes a new server certificate and key, and names both files in config.json in one step. It
// keeps the old files.
func (r *renewal) renew(stdout io.Writer) error {
	if r.days < 1 || r.days > serverLife {
		return fmt.Errorf("-days %d: want 1 to %d: some clients refuse a longer validity",
			r.days, serverLife)
	}
	config := filepath.Join(r.dir, "config.json")
	c, err := mtlsserver.Load(config)
	if err != nil {
		return err
	}
	template, err := serverTemplate(r.hosts, time.Duration(r.days)*day)
	if err != nil {
		return err
	}
	if len(r.hosts) == 0 {
		old, err := readCertificate(within(r.dir, c.TLS.Cert))
		if err != nil {
			return err
		}
		template.DNSNames, template.IPAddresses = old.DNSNames, old.IPAddresses
	}
	ca, _, err := loadCA(r.dir)
	if err != nil {
		return err
	}
	stem, files, err := writeFree(r.dir, "server", func(stem string) ([]file, error) {
		_, files, err := sign(stem, template, ca)
		if err == nil {
			files[0].like, files[1].like = within(r.dir, c.TLS.Key), within(r.dir, c.TLS.Cert)
		}
		return files, err
	})
	if err != nil {
		return err
	}
	var old mtlsserver.Files
	err = edit(config, func(d *document) error {
		old = d.config.TLS
		d.replace("tls.cert", strconv.Quote(stem+".pem"))
		d.replace("tls.key", strconv.Quote(stem+".key"))
		return nil
	})
	if err != nil {
		remove(r.dir, files)
		return err
	}
	fmt.Fprintf(stdout, "Made %s and %s, valid until %s, and named them in %s.\n"+
		"A running server uses them after mtlsserver reload or SIGHUP.\n"+
		"The old ones are still in %s and %s.\n",
		filepath.Join(r.dir, stem+".pem"), filepath.Join(r.dir, stem+".key"),
		template.NotAfter.UTC().Format(time.DateOnly), config,
		within(r.dir, old.Cert), within(r.dir, old.Key))
	return nil
}
