//! `RUN --mount` and `RUN --device`: CSV lines of keys and values (rows `df.run.mount*`,
//! `df.run.device`).

use crate::{
    ast::{Device, Mount, MountKind, MountSpec, Sharing},
    error::{Error, Result},
    expand::Expander,
    literals::{self, with_suggestion},
    token::Token,
};
use shipway_gocompat::{parse_bool, quote};

const KEYS: [&str; 19] = [
    "type",
    "from",
    "source",
    "target",
    "readonly",
    "id",
    "sharing",
    "required",
    "size",
    "mode",
    "uid",
    "gid",
    "src",
    "dst",
    "destination",
    "ro",
    "rw",
    "readwrite",
    "env",
];

impl MountKind {
    const ALL: [Self; 5] = [Self::Bind, Self::Cache, Self::Tmpfs, Self::Secret, Self::Ssh];

    /// Its name in `type=`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bind => "bind",
            Self::Cache => "cache",
            Self::Tmpfs => "tmpfs",
            Self::Secret => "secret",
            Self::Ssh => "ssh",
        }
    }
}

impl Sharing {
    const ALL: [Self; 3] = [Self::Shared, Self::Private, Self::Locked];

    /// Its name in `sharing=`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Private => "private",
            Self::Locked => "locked",
        }
    }
}

impl MountSpec {
    /// Reads what is certain before expansion: the fields, and `from`, where no variable may stand.
    pub fn parse(raw: &str) -> Result<Self> {
        let mut from = String::new();
        for field in fields(raw, "mounts")? {
            let Some((key, value)) = field.split_once('=') else { continue };
            if !key.eq_ignore_ascii_case("from") {
                continue;
            }
            if value.find('$').is_some_and(|at| at + 1 != value.len()) {
                let error = Error::new(
                    "'from' doesn't support variable expansion, define alias stage instead",
                )
                .at(Token::Text(field.clone()));
                return Err(error.hint("add a stage `FROM <the image> AS <name>`, where variables work, and say from=<name>"));
            }
            from = value.to_owned();
        }
        Ok(Self { raw: raw.to_owned(), from })
    }

    /// The mount, its values expanded and everything checked.
    pub fn expand(&self, word: &mut Expander<'_>) -> Result<Mount> {
        let mut mount = Mount::default();
        let mut readonly = None;
        for field in fields(&self.raw, "mounts")? {
            let (key, value) = match field.split_once('=') {
                Some((key, value)) => (key.to_lowercase(), Some(word(value)?)),
                None => (field.to_lowercase(), None),
            };
            mount.set(&field, &key, value, &mut readonly)?;
        }
        // Written data survives only where the mount is the place to keep it.
        mount.readonly =
            readonly.unwrap_or(!matches!(mount.kind, MountKind::Cache | MountKind::Tmpfs));
        mount.check()?;
        Ok(mount)
    }
}

impl Mount {
    fn set(
        &mut self,
        field: &str,
        key: &str,
        value: Option<String>,
        readonly: &mut Option<bool>,
    ) -> Result<()> {
        let kind = self.kind;
        let misplaced =
            || Error::new(format!("unexpected key '{key}' for mount type '{}'", kind.name()));
        let waits = matches!(kind, MountKind::Secret | MountKind::Ssh);
        let Some(value) = value else {
            match key {
                "readonly" | "ro" => *readonly = Some(true),
                "readwrite" | "rw" => *readonly = Some(false),
                "required" if waits => self.required = true,
                "required" => return Err(misplaced()),
                _ => {
                    return Err(Error::new(format!(
                        "invalid field '{field}' must be a key=value pair"
                    )));
                }
            }
            return Ok(());
        };
        let truth = |value: &str| {
            parse_bool(value).ok_or_else(|| Error::new(format!("invalid value for {key}: {value}")))
        };
        let number = |value: &str, radix| {
            literals::number(value, radix)
                .ok_or_else(|| Error::new(format!("invalid value {value} for {key}")))
        };
        match key {
            "type" => {
                let lower = value.to_lowercase();
                self.kind =
                    MountKind::ALL.into_iter().find(|k| k.name() == lower).ok_or_else(|| {
                        let message = format!("unsupported mount type {}", quote(&value));
                        with_suggestion(message, &value, &MountKind::ALL.map(MountKind::name), true)
                    })?;
            }
            "from" => self.from = value,
            "source" | "src" => self.source = value,
            "target" | "dst" | "destination" => self.target = value,
            "readonly" | "ro" => *readonly = Some(truth(&value)?),
            "readwrite" | "rw" => *readonly = Some(!truth(&value)?),
            "required" if waits => self.required = truth(&value)?,
            "size" if kind == MountKind::Tmpfs => {
                self.size = shipway_gocompat::parse_size(&value)
                    .ok_or_else(|| Error::new(format!("invalid value for {key}: {value}")))?;
            }
            "required" | "size" => return Err(misplaced()),
            "id" => self.id = value,
            "sharing" => {
                let lower = value.to_lowercase();
                self.sharing = Some(
                    Sharing::ALL.into_iter().find(|s| s.name() == lower).ok_or_else(|| {
                        let message = format!("unsupported sharing value {}", quote(&value));
                        with_suggestion(message, &value, &Sharing::ALL.map(Sharing::name), true)
                    })?,
                );
            }
            "mode" => self.mode = Some(number(&value, 8)?),
            "uid" => self.uid = Some(number(&value, 10)?),
            "gid" => self.gid = Some(number(&value, 10)?),
            "env" => self.env = Some(value),
            _ => {
                return Err(with_suggestion(
                    format!("unexpected key '{key}' in '{field}'"),
                    key,
                    &KEYS,
                    true,
                ));
            }
        }
        Ok(())
    }

    /// Rules between keys.
    fn check(&self) -> Result<()> {
        let kind = self.kind;
        if matches!(kind, MountKind::Bind | MountKind::Tmpfs) {
            let given = [("mode", self.mode), ("uid", self.uid), ("gid", self.gid)]
                .into_iter()
                .find(|(_, v)| v.is_some());
            if let Some((key, _)) = given {
                return Err(Error::new(format!(
                    "{key} not allowed for {} type mounts",
                    quote(kind.name())
                )));
            }
        }
        if kind == MountKind::Secret {
            let message = if !self.from.is_empty() {
                "secret mount should not have a from"
            } else if self.sharing.is_some() {
                "secret mount should not define sharing"
            } else if self.source.is_empty() && self.target.is_empty() && self.id.is_empty() {
                "invalid secret mount. one of source, target required"
            } else if !self.source.is_empty() && !self.id.is_empty() {
                "both source and id can't be set"
            } else {
                ""
            };
            if !message.is_empty() {
                return Err(Error::new(message));
            }
        }
        if self.sharing.is_some() && kind != MountKind::Cache {
            return Err(Error::new(format!("invalid cache sharing set for {} mount", kind.name())));
        }
        Ok(())
    }
}

impl Device {
    /// Reads `name`, `name,required`, `name=…,required=…`.
    pub fn parse(raw: &str) -> Result<Self> {
        let mut device = Self::default();
        for field in fields(raw, "devices")? {
            let (key, value) =
                field.split_once('=').map_or((field.as_str(), None), |(k, v)| (k, Some(v)));
            let key = key.to_lowercase();
            match (key.as_str(), value) {
                ("required", None) => device.required = true,
                ("required", Some(value)) => {
                    device.required = parse_bool(value)
                        .ok_or_else(|| Error::new(format!("invalid value for {key}: {value}")))?;
                }
                ("name", Some(value)) if device.name.is_empty() => device.name = value.to_owned(),
                ("name", Some(_)) => {
                    return Err(Error::new(format!("device name already set to {}", device.name)));
                }
                _ if device.name.is_empty() => device.name = field.clone(),
                (_, None) => {
                    return Err(Error::new(format!(
                        "invalid field '{field}' must be a key=value pair"
                    )));
                }
                _ => {
                    return Err(with_suggestion(
                        format!("unexpected key '{key}' in '{field}'"),
                        &key,
                        &["name", "required"],
                        true,
                    ));
                }
            }
        }
        Ok(device)
    }
}

fn fields(raw: &str, what: &str) -> Result<Vec<String>> {
    literals::csv(raw)
        .map_err(|e| Error { message: format!("failed to parse csv {what}: {}", e.message), ..e })
}
