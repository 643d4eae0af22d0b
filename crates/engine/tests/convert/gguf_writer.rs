//! Writes GGUF files for tests, from the specification and independently of the reader.

/// Parts of a GGUF file; each can be spoilt by a test.
pub(crate) struct GgufWriter {
    pub(crate) version: u32,
    keys: Vec<(String, Vec<u8>)>,
    tensors: Vec<GgufEntry>,
}

struct GgufEntry {
    name: String,
    /// Row length first.
    dimensions: Vec<u64>,
    ty: u32,
    data: Vec<u8>,
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn array(kind: u32, count: usize) -> Vec<u8> {
    let mut bytes = 9u32.to_le_bytes().to_vec();
    bytes.extend(kind.to_le_bytes());
    bytes.extend((count as u64).to_le_bytes());
    bytes
}

impl GgufWriter {
    pub(crate) fn new() -> Self {
        Self { version: 3, keys: vec![], tensors: vec![] }
    }

    /// Sets a key to a value with its type before it; replaces an earlier one.
    pub(crate) fn raw(&mut self, key: &str, value: Vec<u8>) {
        self.remove_key(key);
        self.keys.push((key.to_owned(), value));
    }

    pub(crate) fn remove_key(&mut self, key: &str) {
        self.keys.retain(|(name, _)| name != key);
    }

    pub(crate) fn u32(&mut self, key: &str, value: u32) {
        self.raw(key, [4u32.to_le_bytes(), value.to_le_bytes()].concat());
    }

    pub(crate) fn f32(&mut self, key: &str, value: f32) {
        self.raw(key, [6u32.to_le_bytes(), value.to_le_bytes()].concat());
    }

    pub(crate) fn text(&mut self, key: &str, value: &str) {
        self.raw(key, [8u32.to_le_bytes().to_vec(), string(value)].concat());
    }

    pub(crate) fn texts(&mut self, key: &str, values: &[String]) {
        let mut bytes = array(8, values.len());
        bytes.extend(values.iter().flat_map(|value| string(value)));
        self.raw(key, bytes);
    }

    pub(crate) fn ints(&mut self, key: &str, values: &[i32]) {
        let mut bytes = array(5, values.len());
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self.raw(key, bytes);
    }

    /// Adds a tensor of `shape` (rows first) and GGUF type id `ty`; replaces an earlier one.
    pub(crate) fn tensor(&mut self, name: &str, shape: &[usize], ty: u32, data: Vec<u8>) {
        self.remove_tensor(name);
        let dimensions = shape.iter().rev().map(|&size| size as u64).collect();
        self.tensors.push(GgufEntry { name: name.to_owned(), dimensions, ty, data });
    }

    pub(crate) fn remove_tensor(&mut self, name: &str) {
        self.tensors.retain(|tensor| tensor.name != name);
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            bytes.extend(string(key));
            bytes.extend(value);
        }
        let mut offset = 0u64;
        for GgufEntry { name, dimensions, ty, data } in &self.tensors {
            bytes.extend(string(name));
            bytes.extend((dimensions.len() as u32).to_le_bytes());
            bytes.extend(dimensions.iter().flat_map(|size| size.to_le_bytes()));
            bytes.extend(ty.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            offset += (data.len() as u64).next_multiple_of(32);
        }
        for tensor in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            bytes.extend(&tensor.data);
        }
        bytes
    }
}
