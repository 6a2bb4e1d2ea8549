#include "patch_statistics.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "wide.h"
#include "workspace.h"

// The products of two patch entries, summed over positions, depend nearly on the offset between the two entries alone.
// So instead of K (K + 1) / 2 sums there are C^2 25 / 2: autocorrelations of the images, 114 instead of 378 for C = 3.
//
// With m the mean of a channel, Y = x - m inside the image and 0 outside, I = 1 inside and 0 outside, an entry k of
// the patch, shifted by m so that nothing cancels, is z_k = Y_k - m_k (1 - I_k). Its products need those of Y with Y,
// Y with I and I with I. For any two of these, entries k and l at (dy, dx) and (dy', dx') of the patch, offset d:
//
//     sum over centres of Y_k Y_l  =  whole(d) - [dy = dy' = +-1] edge row - [dx = dx' = +-1] edge column + corner
//
// where whole(d) is the sum over all pairs at offset d, and the rest are the pairs whose centre lies outside the image:
// the products within the first or last row (column), and of the corner with itself where both are taken off.
namespace cxgrad {
namespace {

constexpr int kReach = 2, kOffsets = 5;  // offsets between two entries: -2 ... 2
constexpr int kMaxChannels = kRegisters == 32 ? 4 : 2;  // of one block: kOffsets accumulators each

constexpr int64_t kCacheBytes = 32 << 10;  // of the first level, for the rows that are read again and again

// What is summed of an image, or of its first or last row or column (which have offsets along one axis).
struct Sums {
  int64_t channels, rows;  // rows: offsets down, 0 ... rows - 1
  double* products;        // [C, C, rows, 5], C x C' at (down, right - 2); not down = 0 with c > c'
  double* inside;          // [C, 2 rows - 1, 5], Y where the offset (down - rows + 1, right - 2) stays inside

  static int64_t size(int64_t channels, int64_t rows) {
    return channels * (channels * rows + 2 * rows - 1) * kOffsets;
  }
  Sums(int64_t channels_, int64_t rows_, double* memory)
      : channels(channels_), rows(rows_), products(memory),
        inside(memory + channels_ * channels_ * rows_ * kOffsets) {}

  double product(int64_t a, int64_t b, int64_t down, int64_t right) const {
    if (down < 0 || (down == 0 && a > b)) return product(b, a, -down, -right);
    return products[((a * channels + b) * rows + down) * kOffsets + right + kReach];
  }
  double sum(int64_t a, int64_t down, int64_t right) const {
    return inside[(a * (2 * rows - 1) + down + rows - 1) * kOffsets + right + kReach];
  }
};

// [C, height, width] in float64, zeros around: vectors may be read kReach to the left and right of a row
struct Image {
  int64_t channels, height, width;
  double* data;

  static int64_t stride_of(int64_t width) { return round_up(width, kWidth<double>) + kMargin; }
  static int64_t size(int64_t channels, int64_t height, int64_t width) {
    return channels * height * stride_of(width) + kMargin;
  }
  int64_t stride() const { return stride_of(width); }
  double* row(int64_t c, int64_t i) const { return data + kMargin + (c * height + i) * stride(); }

  // right of one row and left of the next
  static constexpr int64_t kMargin = kWidth<double> < kReach ? kReach : kWidth<double>;
};

// adds to lanes [Channels, 5] of vectors: a(first + c, i, j) b(other, i + down, j - 2 ... j + 2), rows begin <= i < end
template <int Channels>
void correlate(const Image& image, int64_t first, int64_t other, int64_t down, int64_t begin, int64_t end,
               double* lanes, int64_t lanes_stride) {
  constexpr int W = kWidth<double>;
  const int64_t plane = image.height * image.stride();
  Vec<double> sums[Channels][kOffsets];
  for (int c = 0; c < Channels; ++c)
    for (int k = 0; k < kOffsets; ++k) sums[c][k] = load(lanes + c * lanes_stride + k * W);
  for (int64_t i = begin; i < end; ++i) {
    const double* a = image.row(first, i);
    const double* b = image.row(other, i + down) - kReach;
    for (int64_t j = 0; j < image.width; j += W) {
      Vec<double> at[kOffsets];
#pragma GCC unroll 5
      for (int k = 0; k < kOffsets; ++k) at[k] = load(b + j + k);
#pragma GCC unroll 4
      for (int c = 0; c < Channels; ++c) {
        const Vec<double> value = load(a + c * plane + j);
#pragma GCC unroll 5
        for (int k = 0; k < kOffsets; ++k) sums[c][k] += value * at[k];
      }
    }
  }
  for (int c = 0; c < Channels; ++c)
    for (int k = 0; k < kOffsets; ++k) store(lanes + c * lanes_stride + k * W, sums[c][k]);
}

void sum_products(const Image& image, const Sums& sums) {
  constexpr int64_t W = kWidth<double>;
  const int64_t channels = image.channels, count = channels * channels * sums.rows * kOffsets;
  double* lanes = scratch<double>(Slot::kPartials, count * W);
  std::fill(lanes, lanes + count * W, 0.0);
  const int64_t row_bytes = channels * image.stride() * int64_t(sizeof(double));
  const int64_t rows = std::max<int64_t>(1, kCacheBytes / row_bytes - kReach);
  for (int64_t begin = 0; begin < image.height; begin += rows)
    for (int64_t b = 0; b < channels; ++b)
      for (int64_t down = 0; down < sums.rows; ++down) {
        const int64_t end = std::min(begin + rows, image.height - down);
        for (int64_t a = 0, last = down ? channels : b + 1; a < last; a += kMaxChannels) {
          double* out = lanes + ((a * channels + b) * sums.rows + down) * kOffsets * W;
          const int64_t stride = channels * sums.rows * kOffsets * W;
          switch (std::min<int64_t>(kMaxChannels, last - a)) {
            case 1: correlate<1>(image, a, b, down, begin, end, out, stride); break;
            case 2: correlate<2>(image, a, b, down, begin, end, out, stride); break;
            case 3: correlate<std::min(3, kMaxChannels)>(image, a, b, down, begin, end, out, stride); break;
            default: correlate<kMaxChannels>(image, a, b, down, begin, end, out, stride);
          }
        }
      }
  for (int64_t i = 0; i < count; ++i) sums.products[i] = sum(load(lanes + i * W));
}

void sum_inside(const Image& image, const Sums& sums) {
  std::fill(sums.inside, sums.inside + image.channels * (2 * sums.rows - 1) * kOffsets, 0.0);
  for (int64_t c = 0; c < image.channels; ++c)
    for (int64_t i = 0; i < image.height; ++i) {
      const double* row = image.row(c, i);
      Vec<double> lanes{};
      for (int64_t j = 0; j < image.width; j += kWidth<double>) lanes += load(row + j);
      double of_row[kOffsets];  // without the entries that an offset moves over the border
      of_row[kReach] = sum(lanes);
      for (int64_t k = 1; k <= kReach; ++k) {
        const bool any = k <= image.width;
        of_row[kReach + k] = any ? of_row[kReach + k - 1] - row[image.width - k] : 0;
        of_row[kReach - k] = any ? of_row[kReach - k + 1] - row[k - 1] : 0;
      }
      for (int64_t down = 1 - sums.rows; down < sums.rows; ++down)
        if (i + down >= 0 && i + down < image.height)
          for (int k = 0; k < kOffsets; ++k)
            sums.inside[(c * (2 * sums.rows - 1) + down + sums.rows - 1) * kOffsets + k] += of_row[k];
    }
}

// All sums of one task's images: of the whole, the first and last row, the first and last column, the four corners.
struct Record {
  Sums whole, top, bottom, left, right;
  double* corners;  // [4, C, C + 1]: products, and Y itself; rows first, then columns

  static int64_t size(int64_t channels) {
    return Sums::size(channels, 3) + 4 * Sums::size(channels, 1) + 4 * channels * (channels + 1);
  }
  Record(int64_t channels, double* memory)
      : whole(channels, 3, memory), top(channels, 1, memory + Sums::size(channels, 3)),
        bottom(channels, 1, top.products + Sums::size(channels, 1)),
        left(channels, 1, bottom.products + Sums::size(channels, 1)),
        right(channels, 1, left.products + Sums::size(channels, 1)),
        corners(right.products + Sums::size(channels, 1)) {}

  // sums over centres of Y_k Y_l, and of Y_k I_l; entries (channel, dy, dx)
  double product(int64_t a, int64_t b, int64_t dy, int64_t dx, int64_t other_dy, int64_t other_dx) const {
    return over_centres(
        dy, dx, other_dy, other_dx,
        [&](const Sums& sums, int64_t down, int64_t right_) { return sums.product(a, b, down, right_); },
        [&](int corner) { return corners[(corner * whole.channels + a) * (whole.channels + 1) + b]; });
  }
  double inside(int64_t a, int64_t dy, int64_t dx, int64_t other_dy, int64_t other_dx) const {
    return over_centres(
        dy, dx, other_dy, other_dx,
        [&](const Sums& sums, int64_t down, int64_t right_) { return sums.sum(a, down, right_); },
        [&](int corner) { return corners[(corner * whole.channels + a) * (whole.channels + 1) + whole.channels]; });
  }

 private:
  template <class Part, class Corner>
  double over_centres(int64_t dy, int64_t dx, int64_t other_dy, int64_t other_dx, Part part, Corner corner) const {
    const int64_t down = other_dy - dy, across = other_dx - dx;
    const bool row = down == 0 && dy != 0, column = across == 0 && dx != 0;
    double total = part(whole, down, across);
    if (row) total -= part(dy > 0 ? top : bottom, 0, across);
    if (column) total -= part(dx > 0 ? left : right, 0, down);
    if (row && column) total += corner((dy > 0 ? 0 : 2) + (dx > 0 ? 0 : 1));
    return total;
  }
};

void record_image(const Image& image, const Image& line, Record record) {
  const int64_t height = image.height, width = image.width, channels = image.channels;
  sum_products(image, record.whole);
  sum_inside(image, record.whole);
  const auto record_line = [&](const Sums& sums, int64_t length, auto entry) {
    const Image strip{channels, 1, length, line.data};
    std::fill(strip.data, strip.data + Image::size(channels, 1, length), 0.0);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < length; ++i) strip.row(c, 0)[i] = entry(c, i);
    sum_products(strip, sums);
    sum_inside(strip, sums);
  };
  record_line(record.top, width, [&](int64_t c, int64_t i) { return image.row(c, 0)[i]; });
  record_line(record.bottom, width, [&](int64_t c, int64_t i) { return image.row(c, height - 1)[i]; });
  record_line(record.left, height, [&](int64_t c, int64_t i) { return image.row(c, i)[0]; });
  record_line(record.right, height, [&](int64_t c, int64_t i) { return image.row(c, i)[width - 1]; });
  double* out = record.corners;
  for (int corner = 0; corner < 4; ++corner) {
    const auto value = [&](int64_t c) { return image.row(c, corner < 2 ? 0 : height - 1)[corner % 2 ? width - 1 : 0]; };
    for (int64_t a = 0; a < channels; ++a) {
      for (int64_t b = 0; b < channels; ++b) *out++ = value(a) * value(b);
      *out++ = value(a);
    }
  }
}

template <class T>
double sum_plane(const T* x, int64_t height, int64_t width, int64_t row_stride, int64_t stride) {
  constexpr int64_t W = kWidth<double>;
  if (stride != 1) {
    double total = 0;
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) total += double(x[i * row_stride + j * stride]);
    return total;
  }
  Vec<double> sums[2] = {};
  for (int64_t i = 0; i < height; ++i) {
    const T* row = x + i * row_stride;
    int64_t j = 0;
    for (; j + 2 * W <= width; j += 2 * W) {
      sums[0] += load_wide(row + j);
      sums[1] += load_wide(row + j + W);
    }
    for (; j < width; j += W) sums[0] += load_wide(row + j, width - j);
  }
  return sum(sums[0] + sums[1]);
}

template <class T>
void centre_plane(const T* x, int64_t row_stride, int64_t stride, double mean, const Image& image, int64_t c) {
  constexpr int64_t W = kWidth<double>;
  for (int64_t i = 0; i < image.height; ++i) {
    const T* in = x + i * row_stride;
    double* out = image.row(c, i);
    int64_t j = 0;
    if (stride == 1)
      for (; j + W <= image.width; j += W) store(out + j, load_wide(in + j) - mean);
    for (; j < image.width; ++j) out[j] = double(in[j * stride]) - mean;
    std::fill(out + j, out + image.stride(), 0.0);
  }
}

// mean [K] and covariance [K, K] of a task from the sums over its images
void assemble(const Record& record, const double* means, int64_t images, int64_t height, int64_t width, double* mean,
              double* covariance) {
  const int64_t channels = record.whole.channels, length = 9 * channels;
  const double positions = double(images * height * width);
  // centres whose taps at (dy, dx) and (dy', dx') are both inside, of all images
  const auto both_inside = [&](int64_t dy, int64_t dx, int64_t other_dy, int64_t other_dx) {
    const auto along = [](int64_t size, int64_t a, int64_t b) {
      return std::max<int64_t>(0, size - std::max<int64_t>({0, a, b}) + std::min<int64_t>({0, a, b}));
    };
    return double(images * along(height, dy, other_dy) * along(width, dx, other_dx));
  };
  std::vector<double> excess(length);  // of the mean over the shift
  for (int64_t k = 0; k < length; ++k) {
    const int64_t a = k / 9, dy = k / 3 % 3 - 1, dx = k % 3 - 1;
    const double outside = positions - both_inside(dy, dx, dy, dx);
    excess[k] = (record.inside(a, dy, dx, dy, dx) - means[a] * outside) / positions;
    mean[k] = means[a] + excess[k];
  }
  for (int64_t k = 0; k < length; ++k)
    for (int64_t l = 0; l <= k; ++l) {
      const int64_t a = k / 9, dy = k / 3 % 3 - 1, dx = k % 3 - 1;
      const int64_t b = l / 9, ey = l / 3 % 3 - 1, ex = l % 3 - 1;
      const double k_outside_l = record.inside(a, dy, dx, dy, dx) - record.inside(a, dy, dx, ey, ex);
      const double l_outside_k = record.inside(b, ey, ex, ey, ex) - record.inside(b, ey, ex, dy, dx);
      const double neither = positions - both_inside(dy, dx, dy, dx) - both_inside(ey, ex, ey, ex) +
                             both_inside(dy, dx, ey, ex);
      const double products = record.product(a, b, dy, dx, ey, ex) - means[b] * k_outside_l - means[a] * l_outside_k +
                              means[a] * means[b] * neither;
      covariance[k * length + l] = covariance[l * length + k] = products / positions - excess[k] * excess[l];
    }
}

template <class T>
void patch_statistics(const at::Tensor& x, double* mean, double* covariance) {
  const int64_t tasks = x.size(0), images = x.size(1), channels = x.size(2), height = x.size(3), width = x.size(4);
  const T* data = x.const_data_ptr<T>();
  const auto plane = [&](int64_t i, int64_t c) {
    return data + i / images * x.stride(0) + i % images * x.stride(1) + c * x.stride(2);
  };
  std::vector<double> of_images(tasks * images * channels), means(tasks * channels, 0.0);
  at::parallel_for(0, tasks * images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < channels; ++c)
        of_images[i * channels + c] = sum_plane(plane(i, c), height, width, x.stride(3), x.stride(4));
  });
  for (int64_t i = 0; i < tasks * images; ++i)
    for (int64_t c = 0; c < channels; ++c)
      means[i / images * channels + c] += of_images[i * channels + c] / double(images * height * width);

  const int64_t size = Record::size(channels), image_size = Image::size(channels, height, width);
  const int64_t line_size = Image::size(channels, 1, std::max(height, width));
  std::vector<double> records(tasks * images * size, 0.0);
  at::parallel_for(0, tasks * images, 1, [&](int64_t begin, int64_t end) {
    double* memory = scratch<double>(Slot::kRows, image_size + line_size);
    const Image image{channels, height, width, memory}, line{channels, 1, std::max(height, width), memory + image_size};
    std::fill(memory, memory + Image::kMargin, 0.0);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < channels; ++c)
        centre_plane(plane(i, c), x.stride(3), x.stride(4), means[i / images * channels + c], image, c);
      record_image(image, line, Record(channels, records.data() + i * size));
    }
  });
  for (int64_t task = 0; task < tasks; ++task) {
    double* total = records.data() + task * images * size;
    for (int64_t i = 1; i < images; ++i)
      for (int64_t k = 0; k < size; ++k) total[k] += total[i * size + k];
    assemble(Record(channels, total), means.data() + task * channels, images, height, width, mean + task * 9 * channels,
             covariance + task * 81 * channels * channels);
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> patch_statistics(const at::Tensor& x) {
  const int64_t tasks = x.size(0), length = 9 * x.size(2);
  const auto options = x.options().dtype(at::kDouble);
  at::Tensor mean = at::empty({tasks, length}, options), covariance = at::empty({tasks, length, length}, options);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "patch_statistics", [&] {
    patch_statistics<scalar_t>(x, mean.mutable_data_ptr<double>(), covariance.mutable_data_ptr<double>());
  });
  return {mean, covariance};
}

}  // namespace cxgrad
