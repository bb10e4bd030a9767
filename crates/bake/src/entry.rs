//! What targets say in texts of `key=value` words or in objects: caches, outputs, secrets, agents,
//! attestations.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer, ser::SerializeMap};
use shipway_gocompat::{csv_fields, parse_bool};

use crate::{
    convert::convert,
    value::{Type, Value},
};

type Result<T> = std::result::Result<T, String>;

fn fields(text: &str) -> Result<Vec<String>> {
    csv_fields(text, ',').map_err(|_| format!("{text:?} has a quote in the wrong place"))
}

fn pair(field: &str) -> Result<(&str, &str)> {
    field.split_once('=').ok_or_else(|| format!("invalid value {field}"))
}

/// `key=value`, quoted where it has to be.
fn word(key: &str, value: &str) -> String {
    let word = format!("{key}={value}");
    match word.contains([',', '"']) {
        true => format!("\"{}\"", word.replace('"', "\"\"")),
        false => word,
    }
}

/// An entry of a list in a target.
pub(crate) trait ListEntry: Clone + PartialEq + Sized {
    /// The entries that a text describes.
    fn parse(text: &str) -> Result<Vec<Self>>;

    /// The entry that an object describes.
    fn of_fields(fields: BTreeMap<String, Value>) -> Result<Self>;

    /// As an expression sees it.
    fn value(&self) -> Value;

    /// The type of [`Self::value`].
    fn ty() -> Type {
        Type::map(Type::String)
    }

    /// Without those that are there twice.
    fn unique(all: Vec<Self>) -> Vec<Self>;

    /// The entries that an attribute describes; `None` if it is null.
    fn of_value(value: &Value) -> Result<Option<Vec<Self>>> {
        if value.is_null() {
            return Ok(None);
        }
        let items = match value {
            Value::List(_, items) | Value::Tuple(items) => items,
            other => {
                return Err(crate::convert::mismatch(&other.ty(), &Type::list(Self::ty())));
            }
        };
        let mut all = Vec::new();
        for item in items.iter() {
            match item {
                Value::String(text) if text.is_empty() => {}
                Value::String(text) => all.extend(Self::parse(text)?),
                other => {
                    let as_map = convert(other, &Type::map(Type::Dynamic));
                    let fields = other.mapping().map(|f| (***f).clone());
                    let fields = match (fields, as_map) {
                        (Some(fields), _) => fields,
                        (None, Err(why)) => return Err(why),
                        (None, Ok(_)) => {
                            return Err(crate::convert::mismatch(&other.ty(), &Self::ty()));
                        }
                    };
                    all.push(Self::of_fields(fields)?);
                }
            }
        }
        Ok(Some(all))
    }
}

/// The entries of texts.
pub(crate) fn parse_all<E: ListEntry>(texts: &[String]) -> Result<Vec<E>> {
    let each = texts.iter().filter(|t| !t.is_empty()).map(|t| E::parse(t));
    Ok(each.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// `all` of one list and then of another.
pub(crate) fn merged<E: ListEntry>(mut one: Vec<E>, other: &[E]) -> Vec<E> {
    one.extend_from_slice(other);
    E::unique(one)
}

/// Texts of an object whose values are texts, or can be.
fn texts(fields: BTreeMap<String, Value>) -> Result<BTreeMap<String, String>> {
    let mut out = BTreeMap::new();
    for (name, value) in fields {
        match convert(&value, &Type::String)? {
            Value::String(text) => _ = out.insert(name, text.to_string()),
            _ => return Err(format!("element {name:?}: must not be null")),
        }
    }
    Ok(out)
}

fn text_map(attrs: &BTreeMap<String, String>, more: &[(&str, &str)]) -> Value {
    let own = attrs.iter().map(|(k, v)| (k.clone(), Value::string(v.as_str())));
    let more = more.iter().map(|(k, v)| ((*k).to_owned(), Value::string(*v)));
    Value::map(Type::String, own.chain(more).collect())
}

/// Drops doubles in the order that other programs drop them: from behind, the last one into the
/// gap.
fn without_doubles<E: PartialEq>(mut all: Vec<E>) -> Vec<E> {
    for i in (0..all.len().saturating_sub(1)).rev() {
        if i >= all.len() {
            continue;
        }
        if let Some(j) = (i + 1..all.len()).find(|j| all[i] == all[*j]) {
            all.swap_remove(j);
        }
    }
    all
}

/// The last of each id, at the place of the first.
fn last_of_each<E: Clone>(all: Vec<E>, id: impl Fn(&E) -> &str) -> Vec<E> {
    let mut kept: Vec<E> = Vec::new();
    for entry in all {
        match kept.iter().position(|k| id(k) == id(&entry)) {
            Some(n) => kept[n] = entry,
            None => kept.push(entry),
        }
    }
    kept
}

/// A cache to read or to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    /// Its type, such as `registry`.
    pub kind: String,
    /// Its attributes.
    pub attrs: BTreeMap<String, String>,
}

impl Cache {
    fn checked(self, written: impl FnOnce() -> String) -> Result<Self> {
        match self.kind.is_empty() {
            true => Err(format!("type required form> {:?}", written())),
            false => Ok(self),
        }
    }

    fn one(text: &str) -> Result<Self> {
        let fields = fields(text)?;
        if let [only] = fields.as_slice()
            && !only.contains('=')
        {
            let attrs = BTreeMap::from([("ref".to_owned(), only.clone())]);
            return Ok(Self { kind: "registry".into(), attrs });
        }
        let mut cache = Self { kind: String::new(), attrs: BTreeMap::new() };
        for field in &fields {
            let (key, value) = pair(field)?;
            match key.to_lowercase().as_str() {
                "type" => value.clone_into(&mut cache.kind),
                key => _ = cache.attrs.insert(key.to_owned(), value.to_owned()),
            }
        }
        cache.checked(|| text.to_owned())
    }
}

impl ListEntry for Cache {
    fn parse(text: &str) -> Result<Vec<Self>> {
        // Only names: each is a cache.
        if !text.contains('=') {
            return fields(text)?.iter().map(|f| Self::one(f)).collect();
        }
        Ok(vec![Self::one(text)?])
    }

    fn of_fields(fields: BTreeMap<String, Value>) -> Result<Self> {
        let written = Value::object(fields.clone());
        let mut attrs = texts(fields)?;
        let kind = attrs.remove("type").unwrap_or_default();
        Self { kind, attrs }.checked(|| crate::functions::encode(&written))
    }

    fn value(&self) -> Value {
        text_map(&self.attrs, &[("type", &self.kind)])
    }

    fn unique(all: Vec<Self>) -> Vec<Self> {
        without_doubles(all)
    }
}

/// As flags write it.
impl std::fmt::Display for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&words(&[("type", &self.kind)], &self.attrs))
    }
}

fn words(first: &[(&str, &str)], attrs: &BTreeMap<String, String>) -> String {
    let first = first.iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| word(k, v));
    let words: Vec<String> = first.chain(attrs.iter().map(|(k, v)| word(k, v))).collect();
    words.join(",")
}

fn serialize_attrs<S: Serializer>(
    serializer: S,
    attrs: &BTreeMap<String, String>,
    more: &[(&str, &str)],
) -> std::result::Result<S::Ok, S::Error> {
    // In the order of all names, of which `more` has its own.
    let mut all: Vec<(&str, &str)> = attrs.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    all.retain(|(k, _)| more.iter().all(|(name, _)| name != k));
    all.extend_from_slice(more);
    all.sort_unstable();
    serializer.collect_map(all)
}

impl Serialize for Cache {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serialize_attrs(serializer, &self.attrs, &[("type", &self.kind)])
    }
}

/// What becomes of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its type, such as `image`.
    pub kind: String,
    /// Where it goes, if that is a file or a directory.
    pub dest: String,
    /// Other attributes.
    pub attrs: BTreeMap<String, String>,
}

impl Output {
    /// An output of a type and nothing else.
    pub fn of_kind(kind: &str) -> Self {
        Self { kind: kind.to_owned(), dest: String::new(), attrs: BTreeMap::new() }
    }

    fn checked(self) -> Result<Self> {
        match self.kind.is_empty() {
            true => Err("type is required for output".into()),
            false => Ok(self),
        }
    }
}

impl ListEntry for Output {
    fn parse(text: &str) -> Result<Vec<Self>> {
        let fields = fields(text)?;
        if fields.len() == 1 && fields[0] == text && !text.starts_with("type=") {
            let kind = if text == "-" { "tar" } else { "local" };
            return Ok(vec![Self { dest: text.to_owned(), ..Self::of_kind(kind) }]);
        }
        let mut output = Self::of_kind("");
        for field in &fields {
            let (key, value) = pair(field)?;
            match key.to_lowercase().trim() {
                "type" => value.clone_into(&mut output.kind),
                "dest" => value.clone_into(&mut output.dest),
                key => _ = output.attrs.insert(key.to_owned(), value.to_owned()),
            }
        }
        Ok(vec![output.checked()?])
    }

    fn of_fields(fields: BTreeMap<String, Value>) -> Result<Self> {
        let mut attrs = texts(fields)?;
        let kind = attrs.remove("type").unwrap_or_default();
        let dest = attrs.remove("dest").unwrap_or_default();
        Self { kind, dest, attrs }.checked()
    }

    fn value(&self) -> Value {
        text_map(&self.attrs, &[("type", &self.kind), ("dest", &self.dest)])
    }

    fn unique(all: Vec<Self>) -> Vec<Self> {
        without_doubles(all)
    }
}

/// As flags write it.
impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&words(&[("type", &self.kind), ("dest", &self.dest)], &self.attrs))
    }
}

impl Serialize for Output {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut more = vec![("type", self.kind.as_str())];
        if !self.dest.is_empty() {
            more.push(("dest", &self.dest));
        }
        serialize_attrs(serializer, &self.attrs, &more)
    }
}

/// A secret.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Secret {
    /// The name that steps use.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// The file that has it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub src: String,
    /// The variable that has it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub env: String,
}

impl ListEntry for Secret {
    fn parse(text: &str) -> Result<Vec<Self>> {
        let (mut secret, mut kind) = (Self::default(), String::new());
        for field in &fields(text)? {
            let (key, value) = field
                .split_once('=')
                .ok_or_else(|| format!("invalid field '{field}' must be a key=value pair"))?;
            match key.to_lowercase().as_str() {
                "type" if value == "file" || value == "env" => value.clone_into(&mut kind),
                "type" => return Err(format!("unsupported secret type {value:?}")),
                "id" => value.clone_into(&mut secret.id),
                "source" | "src" => value.clone_into(&mut secret.src),
                "env" => value.clone_into(&mut secret.env),
                key => return Err(format!("unexpected key '{key}' in '{field}'")),
            }
        }
        if kind == "env" && secret.env.is_empty() {
            secret.env = std::mem::take(&mut secret.src);
        }
        Ok(vec![secret])
    }

    fn of_fields(fields: BTreeMap<String, Value>) -> Result<Self> {
        let text = |name: &str| optional_text(&fields, name);
        Ok(Self { id: text("id")?, src: text("src")?, env: text("env")? })
    }

    fn value(&self) -> Value {
        let fields = [("id", &self.id), ("src", &self.src), ("env", &self.env)];
        let fields = fields.map(|(k, v)| (k.to_owned(), Value::string(v.as_str())));
        Value::object(fields.into())
    }

    fn ty() -> Type {
        Type::object(["id", "src", "env"].map(|n| (n.to_owned(), Type::String)))
    }

    fn unique(all: Vec<Self>) -> Vec<Self> {
        last_of_each(all, |s| &s.id)
    }
}

fn optional_text(fields: &BTreeMap<String, Value>, name: &str) -> Result<String> {
    let Some(value) = fields.get(name) else { return Ok(String::new()) };
    let value = convert(value, &Type::String).map_err(|e| format!("attribute {name:?}: {e}"))?;
    Ok(value.as_str().unwrap_or_default().to_owned())
}

/// As flags write it.
impl std::fmt::Display for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let fields = [("id", &*self.id), ("src", &*self.src), ("env", &*self.env)];
        f.write_str(&words(&fields, &BTreeMap::new()))
    }
}

/// An SSH agent, socket or keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Ssh {
    /// The name that steps use.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// A socket, or files of keys; the agent of the environment if there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
}

impl ListEntry for Ssh {
    fn parse(text: &str) -> Result<Vec<Self>> {
        Ok(vec![match text.split_once('=') {
            Some((id, paths)) => {
                Self { id: id.to_owned(), paths: paths.split(',').map(str::to_owned).collect() }
            }
            None => Self { id: text.to_owned(), paths: Vec::new() },
        }])
    }

    fn of_fields(fields: BTreeMap<String, Value>) -> Result<Self> {
        let paths = match fields.get("paths") {
            None => Vec::new(),
            Some(value) => {
                let list = convert(value, &Type::list(Type::String))
                    .map_err(|e| format!("attribute \"paths\": {e}"))?;
                let items = list.sequence().map(|i| i.as_slice()).unwrap_or_default();
                items.iter().filter_map(Value::as_str).map(str::to_owned).collect()
            }
        };
        Ok(Self { id: optional_text(&fields, "id")?, paths })
    }

    fn value(&self) -> Value {
        let paths = Value::strings(self.paths.iter().map(String::as_str));
        let fields =
            [("id".to_owned(), Value::string(self.id.as_str())), ("paths".to_owned(), paths)];
        Value::object(fields.into())
    }

    fn ty() -> Type {
        let fields = [("id", Type::String), ("paths", Type::list(Type::String))];
        Type::object(fields.map(|(n, ty)| (n.to_owned(), ty)))
    }

    fn unique(all: Vec<Self>) -> Vec<Self> {
        last_of_each(all, |s| &s.id)
    }
}

/// As flags write it.
impl std::fmt::Display for Ssh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.paths.is_empty() {
            true => f.write_str(&self.id),
            false => write!(f, "{}={}", self.id, self.paths.join(",")),
        }
    }
}

/// An attestation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attest {
    /// Its type, such as `provenance`.
    pub kind: String,
    /// That it is not wanted.
    pub disabled: bool,
    /// Its attributes.
    pub attrs: BTreeMap<String, String>,
}

impl Attest {
    /// What `--sbom` and `--provenance` mean: a truth, or attributes.
    pub fn shorthand(kind: &str, value: &str) -> String {
        match parse_bool(value) {
            Some(wanted) => format!("type={kind},disabled={}", !wanted),
            None => format!("type={kind},{value}"),
        }
    }
}

impl ListEntry for Attest {
    fn parse(text: &str) -> Result<Vec<Self>> {
        let mut attest = Self { kind: String::new(), disabled: false, attrs: BTreeMap::new() };
        for field in &fields(text)? {
            let (key, value) = pair(field)?;
            match key.to_lowercase().trim() {
                "type" => value.clone_into(&mut attest.kind),
                "disabled" => {
                    attest.disabled =
                        parse_bool(value).ok_or_else(|| format!("invalid value {field}"))?;
                }
                _ => _ = attest.attrs.insert(key.to_owned(), value.to_owned()),
            }
        }
        match attest.kind.is_empty() {
            true => Err("attestation type not specified".into()),
            false => Ok(vec![attest]),
        }
    }

    fn of_fields(fields: BTreeMap<String, Value>) -> Result<Self> {
        let mut attrs = texts(fields)?;
        let kind = attrs.remove("type").unwrap_or_default();
        let disabled = match attrs.remove("disabled") {
            Some(text) => parse_bool(&text).ok_or_else(|| format!("invalid value {text}"))?,
            None => false,
        };
        Ok(Self { kind, disabled, attrs })
    }

    fn value(&self) -> Value {
        let mut more = vec![("type", self.kind.as_str())];
        if self.disabled {
            more.push(("disabled", "true"));
        }
        text_map(&self.attrs, &more)
    }

    fn unique(all: Vec<Self>) -> Vec<Self> {
        last_of_each(all, |a| &a.kind)
    }
}

/// As flags write it.
impl std::fmt::Display for Attest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let disabled = if self.disabled { "true" } else { "" };
        f.write_str(&words(&[("type", &self.kind), ("disabled", disabled)], &self.attrs))
    }
}

impl Serialize for Attest {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut names: Vec<&str> = self.attrs.keys().map(String::as_str).collect();
        names.push("type");
        if self.disabled {
            names.push("disabled");
        }
        names.sort_unstable();
        names.dedup();
        let mut map = serializer.serialize_map(Some(names.len()))?;
        for name in names {
            match name {
                "type" => map.serialize_entry(name, &self.kind)?,
                "disabled" if self.disabled => map.serialize_entry(name, &true)?,
                _ => map.serialize_entry(name, &self.attrs[name])?,
            }
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_are_names_or_words() {
        let parse = |text| {
            Cache::parse(text)
                .map(|all| all.iter().map(Cache::to_string).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(parse("a/b,c"), Ok("type=registry,ref=a/b type=registry,ref=c".into()));
        assert_eq!(parse("Type=gha,MODE=max"), Ok("type=gha,mode=max".into()));
        assert_eq!(parse("mode=max"), Err("type required form> \"mode=max\"".into()));
        assert_eq!(parse("type=x,\"y=a,b\""), Ok("type=x,\"y=a,b\"".into()));
    }

    #[test]
    fn outputs_are_directories_or_words() {
        let parse = |text| Output::parse(text).map(|all| all[0].to_string());
        assert_eq!(parse("out"), Ok("type=local,dest=out".into()));
        assert_eq!(parse("-"), Ok("type=tar,dest=-".into()));
        assert_eq!(parse("type=image,push=true"), Ok("type=image,push=true".into()));
        assert_eq!(parse("dest=x"), Ok("type=local,dest=dest=x".into()));
        assert_eq!(parse("dest=x,a=b"), Err("type is required for output".into()));
    }

    #[test]
    fn later_secrets_take_the_place_of_earlier_ones() {
        let secrets: Vec<Secret> =
            parse_all(&["id=a,src=x".into(), "id=b,env=B".into(), "type=env,id=a,src=A".into()])
                .unwrap();
        let shown: Vec<String> = Secret::unique(secrets).iter().map(Secret::to_string).collect();
        assert_eq!(shown, ["id=a,env=A", "id=b,env=B"]);
        assert_eq!(
            Secret::parse("id=a,sorce=x"),
            Err("unexpected key 'sorce' in 'sorce=x'".into())
        );
    }

    #[test]
    fn doubles_are_dropped_in_the_order_of_others() {
        assert_eq!(without_doubles(vec![1, 2, 1, 3]), [1, 2, 3]);
        assert_eq!(without_doubles(vec![1, 1, 2, 3]), [1, 3, 2]);
        assert_eq!(without_doubles(vec![1, 1, 1, 1]), [1]);
    }
}
