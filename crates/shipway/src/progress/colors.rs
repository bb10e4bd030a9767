//! Colors of the live view, as `NO_COLOR` and `BUILDKIT_COLORS` have them.

use shipway_gocompat::csv_fields;

const NAMES: [&str; 8] = ["black", "red", "green", "yellow", "blue", "magenta", "cyan", "white"];

/// Escape sequences; empty where there is no color.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Palette {
    pub(super) run: String,
    pub(super) cancel: String,
    pub(super) error: String,
    pub(super) faint: String,
}

impl Palette {
    /// The palette that the environment asks for.
    pub(super) fn from_env() -> Self {
        Self::of(
            std::env::var("NO_COLOR").ok().as_deref(),
            std::env::var("BUILDKIT_COLORS").ok().as_deref(),
        )
    }

    fn of(no_color: Option<&str>, colors: Option<&str>) -> Self {
        if no_color.is_some_and(|v| !v.is_empty()) {
            return Self::default();
        }
        let mut palette = Self {
            run: "\x1b[34m".to_owned(),
            cancel: "\x1b[33m".to_owned(),
            error: "\x1b[31m".to_owned(),
            faint: "\x1b[2m".to_owned(),
        };
        let fields = csv_fields(colors.unwrap_or_default(), ':').unwrap_or_default();
        for (key, value) in fields.iter().filter_map(|field| field.split_once('=')) {
            let slot = match &*key.to_lowercase() {
                "run" => &mut palette.run,
                "cancel" => &mut palette.cancel,
                "error" => &mut palette.error,
                // Nothing is drawn as a warning yet, as in other clients.
                _ => continue,
            };
            if let Some(color) = color(value) {
                *slot = color;
            }
        }
        palette
    }

    /// `text` in `color`.
    pub(super) fn paint(color: &str, text: &str) -> String {
        if color.is_empty() { text.to_owned() } else { format!("{color}{text}\x1b[0m") }
    }
}

fn color(value: &str) -> Option<String> {
    let value = value.to_lowercase();
    if value == "default" {
        return Some("\x1b[39m".to_owned());
    }
    let (base, name) = value.strip_prefix("light-").map_or((30, value.as_str()), |name| (90, name));
    if let Some(at) = NAMES.iter().position(|n| *n == name) {
        return Some(format!("\x1b[{}m", base + at));
    }
    let parts: Vec<u8> = value.split(',').map(|n| n.trim().parse().ok()).collect::<Option<_>>()?;
    let [r, g, b] = parts[..] else { return None };
    let cube = 16 + 36 * u32::from(r / 43) + 6 * u32::from(g / 43) + u32::from(b / 43);
    Some(format!("\x1b[38;5;{cube}m"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_chooses_colors() {
        assert_eq!(Palette::of(Some("1"), Some("run=green")), Palette::default());
        let palette =
            Palette::of(None, Some("run=light-green:error=255,0,0:cancel=nonsense:x=red"));
        assert_eq!(
            (palette.run.as_str(), palette.error.as_str(), palette.cancel.as_str()),
            ("\x1b[92m", "\x1b[38;5;196m", "\x1b[33m")
        );
    }
}
