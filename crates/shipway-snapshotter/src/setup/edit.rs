//! Edits of a TOML file that can be taken back.

use shipway_fault::{Code, Fault, Result};
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, TableLike, Value};

/// At the end of each line of ours.
const MARK: &str = " # shipway-snapshotter";
/// What follows the mark where a line was changed, before what was there.
const WAS: &str = ", instead of: ";

/// A value that is wanted.
#[derive(Clone, Copy)]
pub enum Want<'a> {
    Text(&'a str),
    Bool(bool),
    Integer(i64),
    Texts(&'a [&'a str]),
}

impl Want<'_> {
    fn value(self) -> Value {
        match self {
            Self::Text(text) => text.into(),
            Self::Bool(value) => value.into(),
            Self::Integer(value) => value.into(),
            Self::Texts(texts) => Value::from_iter(texts.iter().copied()),
        }
    }

    fn is(self, value: &Value) -> bool {
        match self {
            Self::Text(text) => value.as_str() == Some(text),
            Self::Bool(wanted) => value.as_bool() == Some(wanted),
            Self::Integer(wanted) => value.as_integer() == Some(wanted),
            Self::Texts(wanted) => value.as_array().is_some_and(|list| {
                list.iter().map(Value::as_str).eq(wanted.iter().copied().map(Some))
            }),
        }
    }
}

/// A file that is being changed.
pub struct Edit(DocumentMut);

fn bad(path: &[&str], why: &str) -> Fault {
    Fault::new(Code::FailedPrecondition, format!("{} {why}", path.join(".")))
        .hint("write it as a table of its own, `[a.b]`, or add the settings by hand: `shipway-snapshotter setup --help`")
}

impl Edit {
    pub fn new(text: &str) -> Result<Self> {
        text.parse()
            .map(Self)
            .map_err(|e: toml_edit::TomlError| Fault::invalid(e.to_string().trim_end().to_owned()))
    }

    pub fn into_text(self) -> String {
        self.0.to_string()
    }

    /// Whether it has remarks at most.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn integer(&self, key: &str) -> Option<i64> {
        self.0.get(key)?.as_integer()
    }

    pub fn texts(&self, key: &str) -> Vec<String> {
        let values = self.0.get(key).and_then(Item::as_array).into_iter().flatten();
        values.filter_map(Value::as_str).map(str::to_owned).collect()
    }

    fn table(&self, path: &[&str]) -> Option<&dyn TableLike> {
        let mut table: &dyn TableLike = self.0.as_table();
        for key in path {
            table = table.get(key)?.as_table_like()?;
        }
        Some(table)
    }

    pub fn has_list(&self, path: &[&str], key: &str) -> bool {
        self.table(path).is_some_and(|t| t.contains_key(key))
    }

    /// The table at `path`, made where it is missing.
    fn make(&mut self, path: &[&str]) -> Result<&mut Table> {
        let mut table = self.0.as_table_mut();
        for (depth, key) in path.iter().enumerate() {
            let last = depth + 1 == path.len();
            let item = table.entry(key).or_insert_with(|| {
                let mut new = Table::new();
                // Only the last one needs a line of its own.
                new.set_implicit(!last);
                new.decor_mut().set_suffix(MARK);
                Item::Table(new)
            });
            table = match item {
                Item::Table(table) => table,
                _ => return Err(bad(&path[..=depth], "is no table that can be added to")),
            };
            if table.is_dotted() {
                return Err(bad(&path[..=depth], "is written with dots"));
            }
            if last && table.is_implicit() {
                // It had only tables within: its line is ours.
                table.set_implicit(false);
                table.decor_mut().set_suffix(MARK);
                table.decor_mut().set_prefix("\n");
            }
        }
        Ok(table)
    }

    /// Sets a key of the table at `path`, and remembers what it was.
    pub fn set(&mut self, path: &[&str], key: &str, want: Want<'_>) -> Result<()> {
        match self.table(path).and_then(|t| t.get(key)) {
            Some(Item::Value(value)) if want.is(value) => return Ok(()),
            Some(Item::Value(_)) | None => {}
            Some(_) => return Err(bad(&[path, &[key]].concat(), "is a table")),
        }
        let table = self.make(path)?;
        let mut new = want.value();
        let mark = match table.get(key).and_then(Item::as_value) {
            // Our own line, of other settings, is replaced for good.
            Some(old) if suffix(old).starts_with(MARK) => suffix(old).to_owned(),
            Some(old) if old.to_string().trim_end().contains('\n') => {
                return Err(bad(&[path, &[key]].concat(), "has more than one line"));
            }
            Some(old) => format!("{MARK}{WAS}{}", old.to_string().trim()),
            None => MARK.to_owned(),
        };
        new.decor_mut().set_prefix(" ");
        new.decor_mut().set_suffix(mark);
        match table.get_mut(key) {
            Some(item) => *item = Item::Value(new),
            None => drop(table.insert(key, Item::Value(new))),
        }
        Ok(())
    }

    /// Adds an entry to a list of tables, unless one has the same text under `identity`.
    pub fn add(
        &mut self,
        path: &[&str],
        key: &str,
        identity: &str,
        entry: &[(&str, &str)],
    ) -> Result<()> {
        let whole = [path, &[key]].concat();
        if self.table(path).is_none_or(|t| !t.contains_key(key)) {
            // Nothing that needs a line but the entries.
            let mut table = self.0.as_table_mut();
            for (depth, key) in path.iter().enumerate() {
                let item = table.entry(key).or_insert_with(|| {
                    let mut new = Table::new();
                    new.set_implicit(true);
                    Item::Table(new)
                });
                table = item
                    .as_table_mut()
                    .ok_or_else(|| bad(&path[..=depth], "is no table that can be added to"))?;
            }
            table.insert(key, Item::ArrayOfTables(ArrayOfTables::new()));
        }
        let mut table = self.0.as_table_mut();
        for (depth, key) in path.iter().enumerate() {
            table = table
                .get_mut(key)
                .and_then(Item::as_table_mut)
                .ok_or_else(|| bad(&path[..=depth], "is no table that can be added to"))?;
        }
        let list = table
            .get_mut(key)
            .and_then(Item::as_array_of_tables_mut)
            .ok_or_else(|| bad(&whole, "is no list of tables"))?;
        let same = |t: &Table| {
            entry.iter().any(|(k, v)| *k == identity && t.get(k).and_then(Item::as_str) == Some(v))
        };
        if list.iter().any(same) {
            return Ok(());
        }
        let mut new = Table::new();
        new.decor_mut().set_prefix("\n");
        new.decor_mut().set_suffix(MARK);
        for (k, v) in entry {
            new.insert(k, Item::Value((*v).into()));
        }
        list.push(new);
        Ok(())
    }

    /// Takes back everything that bears the mark.
    pub fn undo(&mut self) -> Result<()> {
        undo(self.0.as_table_mut())
    }
}

fn suffix(value: &Value) -> &str {
    value.decor().suffix().and_then(|s| s.as_str()).unwrap_or_default()
}

fn is_ours(table: &Table) -> bool {
    table.decor().suffix().and_then(|s| s.as_str()).is_some_and(|s| s.starts_with(MARK))
}

fn undo(table: &mut Table) -> Result<()> {
    let keys: Vec<String> = table.iter().map(|(key, _)| key.to_owned()).collect();
    for key in keys {
        let Some(item) = table.get_mut(&key) else { continue };
        let gone = match item {
            Item::Value(value) => match suffix(value).strip_prefix(MARK) {
                Some(rest) => match rest.strip_prefix(WAS) {
                    Some(was) => {
                        let line: DocumentMut = format!("was = {was}")
                            .parse()
                            .map_err(|_| bad(&[&key], "does not say what it was before"))?;
                        let old = line.get("was").and_then(Item::as_value).cloned();
                        *value =
                            old.ok_or_else(|| bad(&[&key], "does not say what it was before"))?;
                        false
                    }
                    None => true,
                },
                None => false,
            },
            Item::Table(below) => {
                undo(below)?;
                if is_ours(below) {
                    below.decor_mut().clear();
                    below.set_implicit(true);
                }
                // A table that stands only for what is in it goes with the last of that.
                below.is_empty() && below.is_implicit()
            }
            Item::ArrayOfTables(list) => {
                list.retain(|entry| !is_ours(entry));
                for entry in list.iter_mut() {
                    undo(entry)?;
                }
                list.is_empty()
            }
            Item::None => false,
        };
        if gone {
            table.remove(&key);
        }
    }
    Ok(())
}
