package main

import (
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/danielepagano/lbproxy/mtlsserver"
)

// revoke removes a user from config.json, or only the given serial of the user if it is not empty.
func revoke(dir, name, serial string, stdout io.Writer) error {
	config := filepath.Join(dir, "config.json")
	var want mtlsserver.Serial
	if serial != "" {
		var err error
		if want, err = mtlsserver.ParseSerial(serial); err != nil {
			return fmt.Errorf("-serial: %w", err)
		}
	}
	var removed []string
	whole := false
	err := edit(config, func(d *document) error {
		i := d.user(name)
		if i < 0 {
			return fmt.Errorf("-name %q: no such user in %s: "+
				"mtlsserver users -config %[2]s lists them", name, config)
		}
		all := d.config.Users[i].Serials
		left := d.keepSerials(i, func(j int, text string) string {
			is, _ := mtlsserver.ParseSerial(all[j].Serial)
			if serial != "" && is != want {
				return text
			}
			removed = append(removed, "0x"+string(is))
			return ""
		})
		if len(removed) == 0 {
			return fmt.Errorf("-serial %q: user %q does not have it: "+
				"mtlsserver users -config %s lists theirs", serial, name, config)
		}
		if whole = left == 0; whole {
			d.edits = nil
			d.remove("users", i)
		}
		return nil
	})
	if err != nil {
		return err
	}
	what := fmt.Sprintf("serial %s of user %q", strings.Join(removed, " "), name)
	if whole {
		what = fmt.Sprintf("user %q with serial %s", name, strings.Join(removed, " "))
	}
	fmt.Fprintf(stdout, "Removed %s from %s.\n"+
		"Their connections end at mtlsserver reload or SIGHUP.\n",
		what, config)
	return nil
}
