package main

import (
	"crypto/x509"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/danielepagano/lbproxy/mtlsserver"
)

// A certKey identifies a certificate.
type certKey struct {
	ca     string // its KeyID
	serial mtlsserver.Serial
}

// users prints a table of the users of a config file, one certificate a line. It shows the expiry
// of the certificates in the config file's folder, where issue puts them.
func users(config string, stdout io.Writer) error {
	c, err := mtlsserver.Load(config)
	if err != nil {
		return err
	}
	dir := filepath.Dir(config)
	cas := map[string]string{} // the files of the CAs, by KeyID
	var issuers []*x509.Certificate
	for _, file := range c.TLS.CA {
		ca, err := readCertificate(within(dir, file))
		if err != nil {
			return err
		}
		cas[mtlsserver.KeyID(ca)] = file
		issuers = append(issuers, ca)
	}
	expiry := expiries(dir, issuers)
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "USER\tSERIAL\tCA\tEXPIRES\tAPPS\tLIMITS")
	for _, u := range c.Users {
		for _, s := range u.Serials {
			serial, _ := mtlsserver.ParseSerial(s.Serial)
			ca := keyIDOf(s.CA)
			if ca == "" {
				ca = mtlsserver.KeyID(issuers[0])
			}
			until := "?"
			if t, ok := expiry[certKey{ca, serial}]; ok {
				until = t.UTC().Format(time.DateOnly)
			}
			apps := plain(strings.Join(u.Apps, ","))
			fmt.Fprintf(w, "%s\t0x%s\t%s\t%s\t%s\t%s\n",
				plain(u.Name), serial, plain(cas[ca]), until, apps, limits(c, &u))
		}
	}
	return w.Flush()
}

// plain quotes a text that would break the table's columns or control a terminal.
func plain(text string) string {
	quoted := fmt.Sprintf("%q", text)
	if quoted == `"`+text+`"` && text != "" && !strings.Contains(text, " ") {
		return text
	}
	return quoted
}

// expiries returns the expiry of each certificate in a folder that one of the issuers has signed.
func expiries(dir string, issuers []*x509.Certificate) map[certKey]time.Time {
	all := map[certKey]time.Time{}
	files, _ := filepath.Glob(filepath.Join(dir, "*.pem")) // unreadable ones are left out
	for _, path := range files {
		cert, err := readCertificate(path)
		if err != nil {
			continue
		}
		serial, err := mtlsserver.SerialOf(cert)
		i := slices.IndexFunc(issuers, func(ca *x509.Certificate) bool {
			return cert.CheckSignatureFrom(ca) == nil
		})
		if err == nil && i >= 0 {
			all[certKey{mtlsserver.KeyID(issuers[i]), serial}] = cert.NotAfter
		}
	}
	return all
}

// limits describes the limits of u, each in one word.
func limits(c *mtlsserver.Config, u *mtlsserver.User) string {
	var all []string
	add := func(where string, l *mtlsserver.Limit) {
		if l == nil {
			return
		}
		if l.Burst > 0 {
			all = append(all, fmt.Sprintf("%sburst=%d/%v", where, l.Burst, l.Every))
		}
		if l.Open > 0 {
			all = append(all, fmt.Sprintf("%sopen=%d", where, l.Open))
		}
		if l.BytesPerSecond > 0 {
			all = append(all, fmt.Sprintf("%sbytes=%d/s", where, l.BytesPerSecond))
		}
	}
	if u.Limit != nil {
		add("", u.Limit)
	} else {
		add("", c.DefaultLimit)
	}
	for _, app := range u.Apps {
		if l, ok := u.AppLimits[app]; ok {
			add(plain(app)+":", &l)
		}
	}
	if len(all) == 0 {
		return "none"
	}
	return strings.Join(all, " ")
}
