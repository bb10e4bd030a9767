//! Tables of tab-separated cells, aligned as Go's `tabwriter` does, so that what reads the output
//! of `buildctl` and buildx reads ours.

/// Width of a tab.
const TAB: usize = 8;

/// How columns are told apart.
#[derive(Clone, Copy)]
enum Gap {
    /// By tabs.
    Tabs,
    /// By blanks: the narrowest that a column is with them, and how many there are at least.
    Blanks { column: usize, blanks: usize },
}

/// Aligns lines of cells: each run of lines that have a column in common gets one width for it. The
/// last cell of a line is not a column.
pub(crate) fn align(text: &str) -> String {
    aligned(text, Gap::Tabs)
}

/// The same with one blank between columns, as `buildx imagetools inspect` prints.
pub(crate) fn align_close(text: &str) -> String {
    aligned(text, Gap::Blanks { column: 0, blanks: 1 })
}

/// The same with wide columns, as Docker's own lists are.
pub(crate) fn align_wide(text: &str) -> String {
    aligned(text, Gap::Blanks { column: 10, blanks: 3 })
}

fn aligned(text: &str, gap: Gap) -> String {
    let lines: Vec<Vec<&str>> = text.split('\n').map(|line| line.split('\t').collect()).collect();
    let mut out = String::new();
    block(&lines, &mut Vec::new(), gap, &mut out);
    out.pop();
    out
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

fn block(lines: &[Vec<&str>], widths: &mut Vec<usize>, gap: Gap, out: &mut String) {
    let column = widths.len();
    let mut start = 0;
    while start < lines.len() {
        let has = |line: &&Vec<&str>| column + 1 < line.len();
        let plain = lines[start..].iter().take_while(|line| !has(line)).count();
        print(&lines[start..start + plain], widths, gap, out);
        start += plain;
        let shared = lines[start..].iter().take_while(has).count();
        if shared > 0 {
            let rows = &lines[start..start + shared];
            let widest = rows.iter().map(|line| width(line[column])).max().unwrap_or_default();
            widths.push(match gap {
                Gap::Tabs => (widest + 1).div_ceil(TAB) * TAB,
                Gap::Blanks { column, blanks } => column.max(widest + blanks),
            });
            block(rows, widths, gap, out);
            widths.pop();
            start += shared;
        }
    }
}

fn print(lines: &[Vec<&str>], widths: &[usize], gap: Gap, out: &mut String) {
    for line in lines {
        for (i, cell) in line.iter().enumerate() {
            out.push_str(cell);
            if let Some(column) = widths.get(i) {
                let missing = column.saturating_sub(width(cell));
                out.extend(match gap {
                    Gap::Tabs => std::iter::repeat_n('\t', missing.div_ceil(TAB)),
                    Gap::Blanks { .. } => std::iter::repeat_n(' ', missing),
                });
            }
        }
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_share_a_width_while_lines_have_them() {
        assert_eq!(align("ID\tSIZE\nabcdefgh\t1\nx\t2\n"), "ID\t\tSIZE\nabcdefgh\t1\nx\t\t2\n");
        assert_eq!(align("a\tb\n\nlonger-than-eight\tc\n"), "a\tb\n\nlonger-than-eight\tc\n");
        assert_eq!(align_close("\t\nManifests:\t\n"), "           \nManifests: \n");
        assert_eq!(align_close("Name:\tx\nMediaType:\ty\n"), "Name:      x\nMediaType: y\n");
        assert_eq!(align_wide("A\tB\nlonger than\tc\n"), "A             B\nlonger than   c\n");
        assert_eq!(
            align("Labels:\n\tk:\tv\n\tlonger.key:\tw\n"),
            "Labels:\n\tk:\t\tv\n\tlonger.key:\tw\n"
        );
    }
}
