package main

import (
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/danielepagano/lbproxy/internal/strictjson"
	"github.com/danielepagano/lbproxy/mtlsserver"
)

// addCA makes a CA, which signs new certificates from now on, and adds it to config.json. The old
// CAs stay in force, so addCA adds the old CA's id to every serial that has none.
func addCA(dir string, stdout io.Writer) error {
	config := filepath.Join(dir, "config.json")
	c, err := mtlsserver.Load(config)
	if err != nil {
		return err
	}
	oldFile := within(dir, c.TLS.CA[0])
	old, err := readCertificate(oldFile)
	if err != nil {
		return err
	}
	// The name must be unique, because clients choose their certificate by the names of CAs.
	now := time.Now().UTC().Format("2006-01-02T15:04:05.000000000")
	template := caTemplate("mtlsserver CA " + now)
	stem, files, err := writeFree(dir, "ca", func(stem string) ([]file, error) {
		_, files, err := sign(stem, template, nil)
		if err == nil {
			files[0].like, files[1].like = keyBeside(oldFile), oldFile
		}
		return files, err
	})
	if err != nil {
		return err
	}
	err = edit(config, func(d *document) error {
		if !slices.Equal(d.config.TLS.CA, c.TLS.CA) {
			return fmt.Errorf("%s: another command has changed tls.ca: try again", config)
		}
		cas := append(slices.Clone(c.TLS.CA), stem+".pem")
		d.replace("tls.ca", quoted(cas))
		return d.nameCA(mtlsserver.KeyID(old))
	})
	if err != nil {
		remove(dir, files)
		return err
	}
	fmt.Fprintf(stdout, "Made %s and %s, and added the CA to %s.\n"+
		"New certificates are signed by it. "+
		"A running server accepts it after mtlsserver reload or SIGHUP.\n",
		filepath.Join(dir, stem+".pem"), filepath.Join(dir, stem+".key"), config)
	return nil
}

// nameCA adds the KeyID of a CA to every serial that names no CA.
func (d *document) nameCA(id string) (err error) {
	for i, user := range d.config.Users {
		d.keepSerials(i, func(j int, text string) string {
			s := user.Serials[j]
			if s.CA != "" {
				return text
			}
			s.CA = id
			entry, encodeErr := strictjson.Encode(s)
			if encodeErr != nil {
				err = encodeErr
			}
			return string(entry)
		})
	}
	return err
}

// dropCA removes a CA and all its serials from config.json. It fails if a user would be left
// without a serial.
func dropCA(dir, file string, stdout io.Writer) error {
	config := filepath.Join(dir, "config.json")
	serials := 0
	err := edit(config, func(d *document) error {
		cas := d.config.TLS.CA
		at := slices.Index(cas, file)
		switch {
		case at < 0:
			return fmt.Errorf("-drop %q: want one of %q, which %s has in tls.ca", file, cas, config)
		case len(cas) == 1:
			return fmt.Errorf("-drop %q: it is the only CA: add another first, by "+
				"mtlsserver rotate -dir %s", file, dir)
		}
		ca, err := readCertificate(within(dir, file))
		if err != nil {
			return err
		}
		d.replace("tls.ca", quoted(slices.Delete(slices.Clone(cas), at, at+1)))
		id, stranded := mtlsserver.KeyID(ca), []string(nil)
		for i, user := range d.config.Users {
			left := d.keepSerials(i, func(j int, text string) string {
				if keyIDOf(user.Serials[j].CA) != id {
					return text
				}
				serials++
				return ""
			})
			if left == 0 {
				stranded = append(stranded, user.Name)
			}
		}
		if n := len(stranded); n > 0 {
			return fmt.Errorf("-drop %q: %s would have no certificate left: %q: "+
				"issue new ones, or revoke the users", file, count(n, "user"), stranded[:min(n, 10)])
		}
		return nil
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "Removed the CA %q and %s from %s. Its files stay.\n"+
		"A running server ends the connections of its certificates "+
		"after mtlsserver reload or SIGHUP.\n",
		file, count(serials, "serial"), config)
	return nil
}

// keyIDOf converts a KeyID as tools print digests, in upper case or with colons, to the form of
// [mtlsserver.KeyID].
func keyIDOf(text string) string { return strings.ToLower(strings.ReplaceAll(text, ":", "")) }

// count returns "1 user" or "2 users".
func count(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return fmt.Sprint(n, " ", noun)
}

// quoted returns a list of texts in JSON.
func quoted(texts []string) string {
	list, _ := json.Marshal(texts) // strings always marshal
	return string(list)
}
