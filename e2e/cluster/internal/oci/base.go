package oci

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// basePackages are what a dynamic program of the GNU target needs.
var basePackages = []string{"libc6", "libgcc-s1", "ca-certificates"}

// baseDrops are parts of the packages that no such program reads.
var baseDrops = []string{
	"usr/share/doc", "usr/share/locale", "usr/share/lintian", "usr/share/man",
	"usr/lib/*/gconv", "usr/lib/*/audit", "usr/sbin",
}

var baseFiles = map[string]string{
	"etc/passwd":        "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n",
	"etc/group":         "root:x:0:\nnonroot:x:65532:\n",
	"etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}

// BaseLayer returns a layer of Debian's C library and certificates, made once
// for each version of the packages.
func BaseLayer(cache string) (string, error) {
	key, err := baseKey()
	if err != nil {
		return "", err
	}
	layer := filepath.Join(cache, "base-"+key+".tar")
	if _, err := os.Stat(layer); err == nil {
		return layer, nil
	}
	work, err := os.MkdirTemp("", "herd-base-*")
	if err != nil {
		return "", fmt.Errorf("base layer: %w", err)
	}
	defer os.RemoveAll(work)
	root := filepath.Join(work, "root")
	if err := unpackBase(work, root); err != nil {
		return "", fmt.Errorf("base layer: %w", err)
	}
	if err := completeBase(root); err != nil {
		return "", fmt.Errorf("base layer: %w", err)
	}
	file, err := os.CreateTemp(cache, ".base-*")
	if err != nil {
		return "", fmt.Errorf("base layer: %w", err)
	}
	defer os.Remove(file.Name()) // gone already once it is in place
	defer file.Close()
	if err := (Source{root, "/"}).writeTo(file); err != nil {
		return "", err
	}
	if err := file.Chmod(0o644); err != nil {
		return "", fmt.Errorf("base layer: %w", err)
	}
	return layer, os.Rename(file.Name(), layer)
}

// baseKey names the packages' contents and this recipe.
func baseKey() (string, error) {
	shown, err := exec.Command("apt-cache", append([]string{"show", "--no-all-versions"}, basePackages...)...).Output()
	if err != nil {
		return "", fmt.Errorf("base layer: apt-cache show %s: %w", strings.Join(basePackages, " "), err)
	}
	sum := sha256.New()
	for line := range bytes.Lines(shown) {
		if bytes.HasPrefix(line, []byte("SHA256:")) {
			sum.Write(line)
		}
	}
	fmt.Fprintf(sum, "%q%q", baseDrops, baseFiles)
	return hex.EncodeToString(sum.Sum(nil))[:20], nil
}

func unpackBase(work, root string) error {
	download := exec.Command("apt-get", append([]string{"download", "-o", "APT::Sandbox::User=root"}, basePackages...)...)
	download.Dir = work
	if out, err := download.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get download: %w: %s", err, bytes.TrimSpace(out))
	}
	packages, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil {
		return err
	}
	for _, file := range packages {
		if out, err := exec.Command("dpkg", "-x", file, root).CombinedOutput(); err != nil {
			return fmt.Errorf("dpkg -x %s: %w: %s", filepath.Base(file), err, bytes.TrimSpace(out))
		}
	}
	return nil
}

// completeBase does what the packages' scripts would and drops what is not
// needed.
func completeBase(root string) error {
	certificates, err := filepath.Glob(filepath.Join(root, "usr/share/ca-certificates/mozilla/*.crt"))
	if err != nil {
		return err
	}
	slices.Sort(certificates)
	var bundle []byte
	for _, path := range certificates {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		bundle = append(bundle, text...)
	}
	for _, pattern := range append(slices.Clone(baseDrops), "usr/share/ca-certificates") {
		matches, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return err
		}
		for _, path := range matches {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	if err := writeBelow(root, "etc/ssl/certs/ca-certificates.crt", bundle); err != nil {
		return err
	}
	for name, text := range baseFiles {
		if err := writeBelow(root, name, []byte(text)); err != nil {
			return err
		}
	}
	tmp := filepath.Join(root, "tmp")
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return err
	}
	return os.Chmod(tmp, 0o777|fs.ModeSticky)
}

func writeBelow(root, name string, content []byte) error {
	path := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o644)
}
