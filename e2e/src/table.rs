//! What `kubectl get` prints for people.

/// Rows of cells; a cell may hold spaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The first line.
    pub headers: Vec<String>,
    /// The others.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// Columns start where the headers do.
    pub fn parse(text: &str) -> Self {
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        let starts = starts(first);
        let cells = |line: &str| {
            let characters: Vec<char> = line.chars().collect();
            let ends = starts.iter().skip(1).copied().chain([characters.len()]);
            starts.iter().zip(ends).map(|(&start, end)| cell(&characters, start, end)).collect()
        };
        Self { headers: cells(first), rows: lines.map(cells).collect() }
    }

    /// Of the row whose first cell is `name`.
    pub fn cell(&self, name: &str, header: &str) -> Option<&str> {
        let column = self.headers.iter().position(|other| other == header)?;
        let row = self.rows.iter().find(|row| row.first().is_some_and(|first| first == name))?;
        row.get(column).map(String::as_str)
    }
}

fn starts(headers: &str) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut before = ' ';
    for (index, character) in headers.chars().enumerate() {
        if character != ' ' && before == ' ' {
            starts.push(index);
        }
        before = character;
    }
    starts
}

fn cell(line: &[char], start: usize, end: usize) -> String {
    let end = end.min(line.len());
    let cell: String = line.get(start..end).unwrap_or_default().iter().collect();
    cell.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_may_hold_spaces_or_nothing() {
        let table = Table::parse(
            "NAME   READY   GANGS                     AGE\n\
             a      True    prefill 1/1, decode 1/1   5s\n\
             bb                                       6m\n",
        );
        assert_eq!(table.headers, ["NAME", "READY", "GANGS", "AGE"]);
        assert_eq!(table.cell("a", "GANGS"), Some("prefill 1/1, decode 1/1"));
        assert_eq!((table.cell("bb", "READY"), table.cell("bb", "AGE")), (Some(""), Some("6m")));
        assert_eq!((table.cell("c", "READY"), table.cell("a", "ROLE")), (None, None));
    }
}
