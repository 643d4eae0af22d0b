package oci

import (
	"archive/tar"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// A Source is one layer's content: a folder or a file placed at a path of the
// image.
type Source struct {
	Path string
	// At is where it goes; "/" for a folder that is the root.
	At string
}

// writeTo writes the layer's tar. The same content has the same bytes: names
// in order, no times, owner 0.
func (s Source) writeTo(w io.Writer) error {
	layer := tar.NewWriter(w)
	if err := s.writeParents(layer); err != nil {
		return err
	}
	// WalkDir is in lexical order.
	err := filepath.WalkDir(s.Path, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		inside, err := filepath.Rel(s.Path, file)
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path.Join(s.At, filepath.ToSlash(inside)), "/")
		if name == "" {
			return nil
		}
		return writeEntry(layer, name, file, entry)
	})
	if err != nil {
		return fmt.Errorf("layer of %s: %w", s.Path, err)
	}
	return layer.Close()
}

func (s Source) writeParents(layer *tar.Writer) error {
	parts := strings.Split(strings.Trim(path.Dir(s.At), "/"), "/")
	for n := range parts {
		name := path.Join(parts[:n+1]...)
		if name == "" {
			continue
		}
		header := &tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755}
		if err := layer.WriteHeader(header); err != nil {
			return err
		}
	}
	return nil
}

func writeEntry(layer *tar.Writer, name, file string, entry fs.DirEntry) error {
	info, err := entry.Info()
	if err != nil {
		return err
	}
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		if target, err = os.Readlink(file); err != nil {
			return err
		}
	}
	header, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	header.Name = name
	if info.IsDir() {
		header.Name += "/"
	}
	header.Uid, header.Gid, header.Uname, header.Gname = 0, 0, "", ""
	header.ModTime, header.AccessTime, header.ChangeTime = time.Time{}, time.Time{}, time.Time{}
	header.Format = tar.FormatPAX
	if err := layer.WriteHeader(header); err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return nil
	}
	content, err := os.Open(file)
	if err != nil {
		return err
	}
	defer content.Close()
	_, err = io.Copy(layer, content)
	return err
}
